"""What can go wrong, and whether trying again helps.

DeepfakeError
├── TransientError          trying again may help; tasks retry these and nothing else
│   ├── DownloadError       the network, Kaggle's servers or the store of shared data failed
│   ├── DeviceError         an accelerator failed while it trained
│   └── ProductionMovedError  another version went into production while two were compared
└── PermanentError          trying again won't help; a person has to act
    ├── ConfigurationError  a parameter, a flag or a file of parameters
    ├── CredentialsError    Kaggle's or the store's credentials are missing or refused
    ├── SourceError         a source does not exist, or this account may not read it
    ├── ArchiveError        an archive is not a zip, or what was fetched is damaged
    ├── DiskError           a disk is full, or a file or folder can't be written
    ├── DatasetError        the images can't make a data set: a class without images, labels that disagree
    ├── LockedError         another run holds the data folder
    ├── ModelError          a model can't be found, loaded or built
    └── ServiceError        MLflow or Prefect can't be reached, or a training on another machine failed

Each message states the rule, the value received, and what to do. Secrets are removed from it.
A bad image is no error: it is a row of the manifest with a reason.
"""

from deepfake_core.redaction import redact


class DeepfakeError(Exception):
    """Any failure that this project explains."""

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


class TransientError(DeepfakeError):
    """Trying again may help."""


class DownloadError(TransientError):
    """The network, Kaggle's servers or the store of shared data failed."""


class DeviceError(TransientError):
    """An accelerator failed while it trained."""


class ProductionMovedError(TransientError):
    """Another version went into production while two were compared."""


class PermanentError(DeepfakeError):
    """Trying again won't help; a person has to act."""


class ConfigurationError(PermanentError):
    """A parameter, a flag or a file of parameters is wrong."""


class CredentialsError(PermanentError):
    """Kaggle's or the store's credentials are missing or refused."""


class SourceError(PermanentError):
    """A source does not exist, or this account may not read it."""


class ArchiveError(PermanentError):
    """An archive is not a zip, or what was fetched is damaged."""


class DiskError(PermanentError):
    """A disk is full, or a file or folder can't be written."""


class DatasetError(PermanentError):
    """The images can't make a data set."""


class LockedError(PermanentError):
    """Another run holds the data folder."""


class ModelError(PermanentError):
    """A model can't be found, loaded or built."""


class ServiceError(PermanentError):
    """MLflow or Prefect can't be reached."""
