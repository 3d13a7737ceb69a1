"""The domain of the deepfake retraining pipeline: data, models, metrics, registry."""
