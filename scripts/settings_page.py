"""docs/settings.md, as tests/run/test_settings.py compares and writes it."""

from trace_jax.run.settings import settings


def settings_page() -> str:
    """Markdown: a table a section, a line a setting."""
    lines = ["# Settings", "", "Each is given in a configuration file, or as `--config.NAME=VALUE`; in a terminal"]
    lines += [
        "`python -m trace_jax.main settings [NAME]` shows those under a name. A name in brackets says which kind of"
    ]
    lines += ["its section has the setting. Written by tests/run/test_settings.py from the declarations in the code."]
    last = None
    for path, of, default, accepts, about in settings():
        head = path.partition(".")[0] if "." in path else "experiment"
        if head != last:
            lines += ["", f"## {head}", "", "| setting | default | accepts | |", "|---|---|---|---|"]
        last = head
        cells = [f"`{path}`" + f" [{of}]" * bool(of), f"`{default}`" if default else "", accepts, about]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
