"""The files of a published data set, from the Hugging Face hub, at one commit."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from pathlib import Path

from trace_jax.data.errors import DataError
from trace_jax.data.published.files import patterns
from trace_jax.data.published.table import Published

_REFUSED = (401, 403)


def download(name: str, dataset: Published, configs: Sequence[str], revision: str) -> tuple[Path, str]:
    """Downloads the files of those configurations, or takes them from the hub's cache.

    Args:
      revision: a commit, or a branch or tag, for which the commit is found that it is now.

    Returns:
      Where the files are, and their commit.

    Raises:
      DataError: no access (how to ask), or no connection (how to do it elsewhere).
    """
    try:
        hub = importlib.import_module("huggingface_hub")
        errors = importlib.import_module("huggingface_hub.errors")
    except ImportError:
        raise DataError(f"{name}: needs the package huggingface_hub: pip install 'trace-jax[data]'.") from None
    wanted = [p for c in configs for split in dataset.subsets[c].rows for p in patterns(dataset, c, split)]
    try:
        if not re.fullmatch(r"[0-9a-f]{40}", revision):
            revision = hub.HfApi().dataset_info(dataset.repository, revision=revision).sha
        root = hub.snapshot_download(
            dataset.repository, repo_type="dataset", revision=revision, allow_patterns=sorted(set(wanted))
        )
    except (OSError, ValueError, errors.HTTPError) as error:
        if dataset.gated and any(_status(e) in _REFUSED for e in (error, error.__cause__)):
            raise DataError(f"{name}: {dataset.repository} is gated: {dataset.gated}.") from None
        why = str(error).strip().split("\n")[0] or type(error).__name__
        gated = f" It is gated: {dataset.gated}." if dataset.gated else ""
        raise DataError(
            f"{name}: {dataset.repository} can't be downloaded ({why}).{gated} Where the hub can be reached: "
            f"hf download {dataset.repository} --repo-type dataset --revision {revision} --local-dir DIR; then build "
            "it here with --source DIR."
        ) from None
    return Path(root), revision


def _status(error: BaseException | None) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)
