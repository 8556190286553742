"""Errors of the commands, sorted by who must act. Standard library only.

    DalleError                       root of everything raised on purpose    500  internal_error
    ├── UserError                    the author of the job or request        400  bad_request
    │   ├── JobError                 a file of the job's contract is wrong   400  bad_job
    │   │   ├── HyperparameterError  one is unknown, mistyped, out of range  400  bad_hyperparameter
    │   │   └── ChannelError         one is missing, empty or unexpected     400  bad_channel
    │   ├── DataError                an image or a caption cannot be used    400  bad_data
    │   │   └── CaptionTooLong       more text tokens than the model reads   422  caption_too_long
    │   ├── ArtefactError            a model is missing, damaged or foreign  422  bad_artefact
    │   │   └── ForeignFileError     weights that others published: refused  422  bad_artefact
    │   ├── CheckpointError          checkpoints are foreign or damaged      409  bad_checkpoint
    │   ├── DivergenceError          loss, gradient or weight is not finite  422  diverged
    │   ├── PlanError                AWS's limits rule the request out       422  bad_plan
    │   ├── AccessError              AWS refuses the caller's credentials    403  no_access
    │   └── PriceMissing             the price is unknown; refresh reads it  404  price_missing
    └── PlatformError                the machine or service underneath       503  platform_error
        ├── DiskFullError            nothing more can be written             507  disk_full
        ├── DeviceError              the device asked for is not usable      503  device_error
        ├── HostError                another host of the job is missing      503  host_lost
        └── AwsError                 AWS refused, failed or did not answer   502  aws_error

    (last: the HTTP status and the stable code of `serve`'s replies)

Any other exception (`AssertionError`, `KeyError`, …) is a bug of this code and is reported with its
traceback. A message names the thing, its value and the right values.

`field` is the hyperparameter or request field at fault, where one can be named.
"""

from __future__ import annotations


class DalleError(Exception):
    """Root of all errors raised on purpose; raise a subclass.

    status, code: those of the class unless given here.
    """

    status: int = 500
    code: str = "internal_error"

    def __init_subclass__(cls, status: int | None = None, code: str | None = None) -> None:
        """status, code: those of the parent class unless given."""
        cls.status, cls.code = status or cls.status, code or cls.code

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        status: int | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.field = field
        self.status, self.code = status or self.status, code or self.code


class UserError(DalleError, status=400, code="bad_request"):
    """The author of the job or the request must change something."""


class JobError(UserError, code="bad_job"):
    """A file, variable or value of the training job's contract is wrong."""


class HyperparameterError(JobError, code="bad_hyperparameter"):
    """One or more hyperparameters are unknown, mistyped or out of range; all are in the message."""


class ChannelError(JobError, code="bad_channel"):
    """A channel is missing, empty or unexpected."""


class DataError(UserError, code="bad_data"):
    """An image or a caption cannot be used."""


class CaptionTooLong(DataError, status=422, code="caption_too_long"):  # noqa: N818
    """A caption has more text tokens than the model reads."""


class ArtefactError(UserError, status=422, code="bad_artefact"):
    """A trained model's file or component is missing, damaged or of another version."""


class ForeignFileError(ArtefactError):
    """A file of weights that others published is missing, damaged, hostile or of another kind."""


class CheckpointError(UserError, status=409, code="bad_checkpoint"):
    """The checkpoint directory holds another run's state, or only damaged files."""


class DivergenceError(UserError, status=422, code="diverged"):
    """The loss, the gradient or a weight is NaN or infinite."""


class PlanError(UserError, status=422, code="bad_plan"):
    """The platform's limits rule a job or endpoint out; found before any call to AWS.

    The message names the limit and its value.
    """


class AccessError(UserError, status=403, code="no_access"):
    """AWS credentials or region are missing, wrong or expired, or lack a permission."""


class PriceMissing(UserError, status=404, code="price_missing"):  # noqa: N818
    """No price is known and none is guessed; the message says how to read it from AWS."""


class PlatformError(DalleError, status=503, code="platform_error"):
    """The machine or service underneath must be changed, or the call repeated."""


class DiskFullError(PlatformError, status=507, code="disk_full"):
    """The disk has no room for what must be written."""


class DeviceError(PlatformError, code="device_error"):
    """The device asked for is absent or does not work."""


class HostError(PlatformError, code="host_lost"):
    """Another host of the training job did not join, or is lost."""


class AwsError(PlatformError, status=502, code="aws_error"):
    """AWS refused a request, failed, or did not answer."""
