"""What an error of AWS means to the person who asked: one table, with one cause and one cure for each.

Boto retries by itself what is worth a retry: throttling, a server's error, a lost connection. What reaches
this table is what a retry does not cure, or what has outlasted the retries.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from botocore import exceptions  # type: ignore[import-untyped]

from infra.plan import Refused


@dataclass(frozen=True)
class Meaning:
    """One line of the table: the codes of AWS that mean it, why it happened, and what to do about it."""

    codes: frozenset[str]
    cause: str
    cure: str


def _meaning(codes: str, cause: str, cure: str) -> Meaning:
    return Meaning(frozenset(codes.split()), cause, cure)


MEANINGS = (
    _meaning(
        "InsufficientInstanceCapacity InsufficientHostCapacity InsufficientCapacity Unsupported",
        "AWS has no such machine free now",
        "add zones or a worker of another type to the stack file, or try again later",
    ),
    _meaning(
        "VcpuLimitExceeded MaxSpotInstanceCountExceeded InstanceLimitExceeded",
        "this account's quota is used up",
        "ask for more at https://console.aws.amazon.com/servicequotas, or lower `max` of the workers",
    ),
    _meaning(
        "SpotMaxPriceTooLow InsufficientFreeAddressesInSubnet",
        "the spot market or the subnet has nothing to offer in this zone",
        "use `market: on-demand`, or other zones",
    ),
    _meaning(
        "UnauthorizedOperation AccessDenied AccessDeniedException 403",
        "these credentials may not do that",
        "allow the action named for this user or role, or use credentials that may",
    ),
    _meaning(
        "ExpiredToken ExpiredTokenException RequestExpired TokenRefreshRequired",
        "the credentials have expired",
        "log in again (`aws sso login`), or renew the session token",
    ),
    _meaning(
        "InvalidClientTokenId UnrecognizedClientException AuthFailure InvalidAccessKeyId "
        "SignatureDoesNotMatch",
        "AWS does not know these credentials",
        "check AWS_PROFILE and the access key (`aws sts get-caller-identity`), and this machine's clock",
    ),
    _meaning(
        "RequestLimitExceeded Throttling ThrottlingException TooManyRequestsException SlowDown "
        "RequestThrottled PriorRequestNotComplete",
        "AWS takes no more requests of this account for now",
        "run the same command again in a minute; it goes on where it stopped",
    ),
    _meaning(
        "Unavailable ServiceUnavailable InternalError InternalFailure InternalServerError 503 500",
        "AWS has a failure of its own",
        "run the same command again in a minute; it goes on where it stopped",
    ),
    _meaning(
        "InvalidAMIID.NotFound InvalidAMIID.Unavailable InvalidAMIID.Malformed",
        "the machine image is gone",
        "run `up` again: with no node running it takes the newest image",
    ),
    _meaning(
        "OptInRequired PendingVerification Blocked AccountProblem",
        "this account may not use EC2 here yet",
        "finish the sign-up or enable the region in the AWS console",
    ),
    _meaning(
        "InvalidInstanceType InvalidParameterCombination",
        "this region has no such instance type",
        "choose another `type` or `region`; `aws ec2 describe-instance-type-offerings` lists them",
    ),
    _meaning(
        "InvalidKeyPair.NotFound InvalidGroup.NotFound InvalidSubnetID.NotFound NoSuchEntity NoSuchBucket",
        "what the nodes need has been deleted meanwhile",
        "run `up` again: it makes what is missing",
    ),
    _meaning(
        "BucketAlreadyExists",
        "another account owns a bucket of that name",
        "name a bucket of yours in `storage.bucket`, or choose another name for the stack",
    ),
    _meaning(
        "LimitExceeded SecurityGroupLimitExceeded TooManyBuckets RulesPerSecurityGroupLimitExceeded",
        "this account may have no more of these",
        "delete what is not needed (`python -m infra gc`), or raise the quota",
    ),
    _meaning(
        "DependencyViolation DeleteConflict",
        "something else still uses it",
        "end what uses it, and run `down` again",
    ),
)

_BY_CODE = {code: meaning for meaning in MEANINGS for code in meaning.codes}
_ENDED_LOGIN = (
    exceptions.SSOError,
    exceptions.TokenRetrievalError,
    exceptions.LoginTokenLoadError,
    exceptions.CredentialRetrievalError,
)
_NO_LOGIN = (exceptions.NoCredentialsError, exceptions.PartialCredentialsError, exceptions.NoAuthTokenError)
_NO_ANSWER = (exceptions.ConnectionError, exceptions.HTTPClientError)


def code_of(error: exceptions.ClientError) -> str:
    """Name the code of an error of AWS, such as `VcpuLimitExceeded`."""
    return str(error.response["Error"]["Code"])


def explain(error: Exception) -> Refused | None:
    """Say in one line why AWS refused and what to do; None for an error that is not about AWS."""
    if isinstance(error, exceptions.ClientError):
        return _explain_answer(error)
    if isinstance(error, _NO_LOGIN):
        return Refused(
            "there are no AWS credentials on this machine: log in (`aws configure`), or set AWS_PROFILE"
        )
    if isinstance(error, _ENDED_LOGIN):
        return Refused("the AWS login has expired or cannot be read: log in again (`aws sso login`)")
    if isinstance(error, exceptions.ProfileNotFound):
        return Refused(f"{error}: set AWS_PROFILE to one that `aws configure list-profiles` shows")
    if isinstance(error, (exceptions.NoRegionError, exceptions.InvalidRegionError)):
        return Refused("the region is not one of AWS: name one such as us-west-2 in `region`")
    if isinstance(error, _NO_ANSWER):
        return Refused(f"AWS does not answer ({error}): check `region` and this machine's network")
    return None


def explain_output(output: str) -> Refused | None:
    """Explain the first error of AWS that a program's output names; None if it names none of the table."""
    for match in re.finditer(r"[A-Z][A-Za-z]+(?:\.[A-Z][A-Za-z]+)?", output):
        meaning = _BY_CODE.get(match.group())
        if meaning is not None:
            line = output[output.rfind("\n", 0, match.start()) + 1 :].split("\n", 1)[0]
            return _refusal(meaning, match.group(), line)
    return None


@contextmanager
def explained() -> Iterator[None]:
    """Turn the errors of AWS that the body meets into `Refused`, one line each.

    Raises:
        Refused: when AWS refused, or could not be asked.
    """
    try:
        yield
    except Exception as error:
        refusal = explain(error)
        if refusal is None:
            raise
        raise refusal from error


def _explain_answer(error: exceptions.ClientError) -> Refused:
    code, operation = code_of(error), error.operation_name
    message = str(error.response["Error"].get("Message", ""))
    meaning = _BY_CODE.get(code)
    if meaning is None:
        return Refused(f"AWS answered {code} to {operation}: {_one_line(message)}")
    return _refusal(meaning, code, message, operation)


def _refusal(meaning: Meaning, code: str, message: str, operation: str = "") -> Refused:
    told = f"{operation}: {code}" if operation else code
    if action := re.search(r"not authorized to perform:? ([\w-]+:\w+)", message):
        told += f"; the action is {action.group(1)}"
    elif "UnauthorizedOperation" in code and operation:
        told += f"; the action is ec2:{operation}"
    if zones := sorted(set(re.findall(r"\b[a-z]{2,3}(?:-[a-z]+)+-\d[a-z]\b", _offered(message)))):
        told += f"; AWS says there is room in {', '.join(zones)}"
    return Refused(f"{meaning.cause} ({told}): {meaning.cure}")


def _offered(message: str) -> str:
    """Cut out of a message about capacity where it names the zones to try."""
    return message.partition("choosing ")[2]


def _one_line(message: str) -> str:
    return " ".join(message.split())[:300]
