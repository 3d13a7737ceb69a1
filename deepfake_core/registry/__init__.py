"""Everything in MLflow; with `deepfake_core.pyfunc_model`, the only code that imports mlflow.

Read `connection` and `names`, then `runs` (what a training logs), `versions`, `seals` (the SHA-256 of their files),
`detectors` (into the registry and out of it), `fingerprint`, `probe`, `scores`, `candidates` (what of each is logged),
`audit` (who moved production, and why), `aliases`, `production` (their moves), `challenge` (the best candidate meets
production), `warm_start` (a training that begins from its network), `approval` (a person decides), `unfinished` (a
training that was killed after its version was registered), `windows` (what was observed of production) and
`model_files` (what housekeeping may remove).

MLflow is where `MLFLOW_TRACKING_URI` points, else `sqlite:///mlflow.db` in the current folder. `connection.connect()`
reads that, once in a process and before anything else here is called; every `MlflowClient()` then uses it.
"""
