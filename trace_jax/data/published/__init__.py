"""Published data sets: what they hold (`table`), their files (`files`), and TensorFlow Datasets of them (`build`)."""
