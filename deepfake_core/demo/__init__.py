"""The drawn images of `make demo`: read `archives` (three zips as Kaggle serves them), `forgeries`, `faces`."""
