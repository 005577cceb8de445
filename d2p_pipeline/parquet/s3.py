"""Files in a bucket: S3, and what speaks its protocol (MinIO, Ceph, SeaweedFS, LocalStack).

A file becomes visible with the one request that ends its upload, a PUT or the completion of a multipart upload, and S3
answers that request when the object is durable. Nothing is buffered here: the bytes are read where the caller has them.

Why botocore and not `pyarrow.fs.S3FileSystem`: that one (26.0) sends no encryption, storage class, tags or metadata of an
object's own; it takes no STS endpoint; and leaving its stream by an exception *completes* the upload, so that readers see
part of a file. Polars and others read with `storage_options`.

A multipart upload that did not end keeps its parts, invisibly and at a price. So each multipart write ends by aborting
all uploads that its key has left, those of killed processes included. Two writers of one key thus may abort each other:
the one that loses gets a TransientStoreError, and both write the same bytes.
"""

import contextlib
import logging
import os
import secrets
import string
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote, urlencode

import pyarrow as pa
from botocore import exceptions as boto
from botocore.config import Config
from botocore.credentials import (
    AssumeRoleCredentialFetcher,
    Credentials,
    DeferredRefreshableCredentials,
    ReadOnlyCredentials,
)
from botocore.session import Session

from d2p_pipeline.parquet.errors import PermanentStoreError, StoreError, TransientStoreError

if TYPE_CHECKING:
    from typing_extensions import Buffer

PART_BYTES = 16 * 2**20
"""Size of the parts of a multipart upload; a file that fits into one is a single PUT. 10,000 parts at most: 160 GiB."""

_PARALLEL_PARTS = 4
_CONNECTIONS = 32
"""Kept open for the next request; more are made when more threads write."""
_DEFAULT_REGION = "us-east-1"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Role:
    """A role to assume with the credentials of the environment, and to assume again before its session ends."""

    arn: str
    session_name: str = "d2p"
    external_id: str | None = None
    sts_endpoint: str | None = None
    """None: that of AWS in the bucket's region."""


@dataclass(frozen=True)
class Bucket:
    """A bucket, how it is reached, and what every object written to it carries."""

    name: str
    prefix: str = ""
    """Start of every key; slashes at its ends make no difference."""
    region: str | None = None
    """None: that of the environment (`AWS_REGION`, profile), else us-east-1."""
    endpoint: str | None = None
    """URL of another service than that of AWS."""
    path_style: bool = False
    """The bucket's name is the first part of the path, not of the host."""
    role: Role | None = None
    encryption: Literal["none", "sse-s3", "sse-kms"] = "none"
    """`none`: whatever the bucket does by default."""
    kms_key_id: str | None = None
    storage_class: str | None = None
    acl: str | None = None
    tags: tuple[tuple[str, str], ...] = ()
    create: bool = False
    """`check` creates the bucket if there is none."""


class S3Store:
    """A bucket's objects. Safe to use from several threads.

    Every method raises TransientStoreError after `attempts` failed for reasons that pass by themselves (exponential
    backoff with jitter between them), PermanentStoreError at once for others. So does the constructor, which looks for
    credentials: environment, profile, web identity, container, instance. `timeout` is the longest silence of the
    server, in seconds.

    A `client` of botocore or boto3 that is given is used as it is; then it says region, endpoint, credentials, timeouts
    and attempts, and the bucket only what to write.
    """

    def __init__(
        self,
        bucket: Bucket,
        *,
        client: Any = None,
        timeout: float = 60.0,
        attempts: int = 5,
        part_bytes: int = PART_BYTES,
    ) -> None:
        self._again = partial(S3Store, client=client, timeout=timeout, attempts=attempts, part_bytes=part_bytes)
        self._root = f"{bucket.prefix.strip('/')}/".lstrip("/")
        self._part_bytes = part_bytes
        self._bucket = bucket
        self._is_given = client is not None
        _keep_secrets_out_of_the_log()
        with self._telling("open", ""):
            if client is None:
                credentials, self._region, self._client = _connect(bucket, timeout, attempts)
                self._frozen_credentials = credentials.get_frozen_credentials
            else:
                self._region, self._client = client.meta.region_name, client
                self._frozen_credentials = partial(_credentials_of, client)
                self._bucket = replace(bucket, endpoint=client.meta.endpoint_url, path_style=True)

    def write(self, path: str, data: "Buffer", metadata: Mapping[str, str] | None = None) -> None:
        """Make `data` durable under `path`, with `metadata` as the object's own (2 KB at most)."""
        view = memoryview(data).cast("B")
        key = self._root + path
        options = self._object_options(metadata or {})
        with self._telling("write", key):
            if len(view) <= self._part_bytes:
                self._client.put_object(Bucket=self._bucket.name, Key=key, Body=pa.BufferReader(view), **options)
            else:
                try:
                    self._upload(key, view, options)
                finally:
                    self._abort_leftovers(key)

    def read(self, path: str) -> bytes:
        """The content of an object."""
        key = self._root + path
        with self._telling("read", key), self._client.get_object(Bucket=self._bucket.name, Key=key)["Body"] as body:
            return body.read()

    def remove(self, path: str) -> None:
        """Remove an object if it is there; needs a right to delete that writing does not."""
        key = self._root + path
        with self._telling("delete", key):
            self._client.delete_object(Bucket=self._bucket.name, Key=key)

    def scan(self, prefix: str = "") -> list[str]:
        """URL of every Parquet file below the directory `prefix`, sorted. They are names, not patterns or quoted URLs."""
        below = f"{self._root}{prefix.strip('/')}/" if prefix.strip("/") else self._root
        with self._telling("list", below):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket.name, Prefix=below)
            keys = [item["Key"] for page in pages for item in page.get("Contents", ())]
        return sorted(self._url(key) for key in keys if _is_parquet(key.rpartition("/")[2]))

    def storage_options(self) -> dict[str, str]:
        """What Polars, and others built on object_store, read `scan`'s URLs with. Holds secrets.

        The credentials are good for ten minutes at least if they are a role's, so ask again for each scan.
        """
        with self._telling("read", self._root):
            credentials = self._frozen_credentials()
        options = {
            "aws_region": self._region,
            "aws_access_key_id": credentials.access_key,
            "aws_secret_access_key": credentials.secret_key,
        }
        if credentials.token:
            options["aws_session_token"] = credentials.token
        if self._bucket.endpoint:
            scheme, _, host = self._bucket.endpoint.partition("://")
            if not self._bucket.path_style:
                host = f"{self._bucket.name}.{host}"
                options["aws_virtual_hosted_style_request"] = "true"
            options["aws_endpoint_url"] = f"{scheme}://{host}"
            options["aws_allow_http"] = "true" if scheme == "http" else "false"
        return options

    def check(self) -> None:
        """Prove that files can be written and leftovers removed: put and delete a small object, begin and abort an upload.

        The StoreError says which right, endpoint, region, credential or clock is wrong.
        """
        target = {"Bucket": self._bucket.name, "Key": f"{self._root}_d2p/check-{secrets.token_hex(8)}"}
        options = self._object_options({})
        with self._telling("write", target["Key"]):
            try:
                self._client.put_object(**target, Body=b"d2p", **options)
            except self._client.exceptions.NoSuchBucket:
                if not self._bucket.create:
                    raise
                self._create_bucket()
                self._client.put_object(**target, Body=b"d2p", **options)
        with self._telling("delete", target["Key"]):
            self._client.delete_object(**target)
        with self._telling("begin and abort an upload of", target["Key"]):
            upload = self._client.create_multipart_upload(**target, **options)
            self._client.abort_multipart_upload(**target, UploadId=upload["UploadId"])
            self._client.list_multipart_uploads(Bucket=self._bucket.name, Prefix=target["Key"])

    def __reduce__(self) -> tuple[Callable[[Bucket], "S3Store"], tuple[Bucket]]:
        """Another process opens the store again, and finds its own credentials."""
        return self._again, (self._bucket,)

    def _url(self, key: str) -> str:
        return f"s3://{self._bucket.name}/{key}"

    @contextlib.contextmanager
    def _telling(self, doing: str, key: str) -> Iterator[None]:
        """Turn what botocore raises into a StoreError."""
        try:
            yield
        except (boto.BotoCoreError, boto.ClientError) as error:
            raise self._error(error, doing, key) from error

    def _error(self, error: Exception, doing: str, key: str) -> StoreError:
        told = _store_error(error, doing, self._url(key), self._bucket)
        if self._is_given:
            told.advice = told.advice.replace("s3_region", "region_name").replace("s3_endpoint", "endpoint_url")
        return told

    def _object_options(self, metadata: Mapping[str, str]) -> dict[str, Any]:
        bucket = self._bucket
        encryption = {"none": None, "sse-s3": "AES256", "sse-kms": "aws:kms"}[bucket.encryption]
        options = {
            "ContentType": "application/vnd.apache.parquet",
            "Metadata": {name: quote(value, safe=_PRINTABLE) for name, value in metadata.items()},
            "ServerSideEncryption": encryption,
            "SSEKMSKeyId": bucket.kms_key_id,
            "StorageClass": bucket.storage_class,
            "ACL": bucket.acl,
            "Tagging": urlencode(bucket.tags),
        }
        return {name: value for name, value in options.items() if value}

    def _upload(self, key: str, view: memoryview, options: dict[str, Any]) -> None:
        target = {"Bucket": self._bucket.name, "Key": key}
        target["UploadId"] = self._client.create_multipart_upload(**target, **options)["UploadId"]

        def send(number: int) -> dict[str, Any]:
            body = pa.BufferReader(view[(number - 1) * self._part_bytes : number * self._part_bytes])
            sent = self._client.upload_part(**target, PartNumber=number, Body=body)
            # A service may answer with a checksum of the part, and wants to be told the same in the end.
            return {"PartNumber": number} | {name: sent[name] for name in _PART_FACTS if name in sent}

        numbers = range(1, -(-len(view) // self._part_bytes) + 1)
        pool = ThreadPoolExecutor(_PARALLEL_PARTS, thread_name_prefix="s3-part")
        try:
            parts = list(pool.map(send, numbers))
            self._client.complete_multipart_upload(**target, MultipartUpload={"Parts": parts})
        except BaseException:
            # A part that arrives after the abort would stay.
            pool.shutdown(cancel_futures=True)
            self._abort(target)
            raise
        finally:
            pool.shutdown()

    def _abort(self, target: dict[str, str]) -> None:
        try:
            self._client.abort_multipart_upload(**target)
        except self._client.exceptions.NoSuchUpload:
            return
        except (boto.BotoCoreError, boto.ClientError) as error:
            self._warn_of_leftovers(target["Key"], error)

    def _abort_leftovers(self, key: str) -> None:
        """Abort what earlier attempts at `key` left. Whether the file is durable does not depend on it, so it only warns."""
        try:
            pages = self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self._bucket.name, Prefix=key)
            uploads = [upload for page in pages for upload in page.get("Uploads", ()) if upload["Key"] == key]
        except (boto.BotoCoreError, boto.ClientError) as error:
            self._warn_of_leftovers(key, error)
            return
        for upload in uploads:
            self._abort({"Bucket": self._bucket.name, "Key": key, "UploadId": upload["UploadId"]})

    def _warn_of_leftovers(self, key: str, error: Exception) -> None:
        told = self._error(error, "remove unfinished uploads of", key)
        _log.warning(
            "%s; they cost storage until the next write of this file, or until a lifecycle rule ends them", told
        )

    def _create_bucket(self) -> None:
        # us-east-1 is the one region that may not be named.
        constraint = {"CreateBucketConfiguration": {"LocationConstraint": self._region}}
        with self._telling("create", ""), contextlib.suppress(self._client.exceptions.BucketAlreadyOwnedByYou):
            self._client.create_bucket(
                Bucket=self._bucket.name, **({} if self._region == _DEFAULT_REGION else constraint)
            )


_PRINTABLE = string.punctuation.replace("%", "")
_PART_FACTS = ("ETag", "ChecksumCRC32", "ChecksumCRC32C", "ChecksumCRC64NVME", "ChecksumSHA1", "ChecksumSHA256")


def _is_parquet(name: str) -> bool:
    return name.endswith(".parquet") and not name.startswith((".", "_"))


# --- connecting


class _Known:
    """What a session asks for credentials."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials

    def load_credentials(self) -> Credentials:
        return self._credentials


def _connect(bucket: Bucket, timeout: float, attempts: int) -> tuple[Credentials, str, Any]:
    """Credentials that renew themselves, the region, and a client."""
    session = Session()
    # Other SDKs of AWS, and what sets the variables in its containers, know both names.
    region = bucket.region or os.environ.get("AWS_REGION") or session.get_config_variable("region") or _DEFAULT_REGION
    network: dict[str, Any] = {
        "max_pool_connections": _CONNECTIONS,
        "connect_timeout": min(timeout, 10.0),
        "read_timeout": timeout,
        "retries": {"mode": "standard", "total_max_attempts": attempts},
    }
    credentials = session.get_credentials()
    if credentials is None:
        raise boto.NoCredentialsError
    if bucket.role:
        credentials = _assumed(session, credentials, bucket.role, region, Config(**network))
        session = Session()
        session.register_component("credential_provider", _Known(credentials))
    # Other services than AWS know the newer checksums not at all, or not as trailers.
    checksums: dict[str, Any] = {
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }
    config = Config(
        **network,
        **(checksums if bucket.endpoint else {}),
        s3={"addressing_style": "path" if bucket.path_style else "auto"},
    )
    client = session.create_client("s3", region_name=region, endpoint_url=bucket.endpoint, config=config)
    return credentials, region, client


def _credentials_of(client: Any) -> ReadOnlyCredentials:
    """What a client signs with at this moment, for readers that are no clients; nothing public tells."""
    credentials = client._get_credentials()
    if credentials is None:
        raise boto.NoCredentialsError
    return credentials.get_frozen_credentials()


def _assumed(session: Session, source: Credentials, role: Role, region: str, config: Config) -> Credentials:
    def create_client(service: str, **keys: Any) -> Any:
        return session.create_client(service, region_name=region, endpoint_url=role.sts_endpoint, config=config, **keys)

    arguments = {"RoleSessionName": role.session_name}
    if role.external_id:
        arguments["ExternalId"] = role.external_id
    fetcher = AssumeRoleCredentialFetcher(create_client, source, role.arn, extra_args=arguments)

    def assume() -> dict[str, str]:
        session_of_role = fetcher.fetch_credentials()
        if datetime.fromisoformat(session_of_role["expiry_time"]) <= datetime.now(UTC):
            reason = f"the session ends at {session_of_role['expiry_time']}, which is past"
            raise PermanentStoreError("assume", role.arn, "Expired", None, reason, _SET_THE_CLOCK)
        return session_of_role

    return DeferredRefreshableCredentials(assume, "assume-role")


def _keep_secrets_out_of_the_log() -> None:
    """In detail botocore logs requests and answers as they are: session tokens, and the keys that STS hands out."""
    logger = logging.getLogger("botocore")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)


# --- telling what is wrong

_TRANSIENT_CODES = frozenset(
    {
        "BadDigest",
        "BandwidthLimitExceeded",
        "IncompleteBody",
        "InternalError",
        "NoSuchUpload",
        "OperationAborted",
        "PriorRequestNotComplete",
        "RequestLimitExceeded",
        "RequestTimeout",
        "RequestTimeoutException",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequestsException",
        "XAmzContentChecksumMismatch",
        "XAmzContentSHA256Mismatch",
    }
)

_SET_THE_CLOCK = "set this machine's clock"
_GIVE_CREDENTIALS = (
    "give credentials as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or a role of the machine"
)
_RENEW_CREDENTIALS = "renew the credentials (AWS_SESSION_TOKEN belongs to them), or use a role, which renews itself"
_CHECK_KEYS = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and that they are meant for this endpoint"

_ADVICE = {
    "AccessControlListNotSupported": "leave s3_acl out: this bucket takes no ACLs",
    "BucketAlreadyExists": "the bucket is somebody else's: choose another s3_bucket_name",
    "ExpiredToken": _RENEW_CREDENTIALS,
    "ExpiredTokenException": _RENEW_CREDENTIALS,
    "InvalidAccessKeyId": _CHECK_KEYS,
    "InvalidClientTokenId": _CHECK_KEYS,
    "InvalidStorageClass": "correct s3_storage_class",
    "InvalidToken": _CHECK_KEYS,
    "NoSuchBucket": "create the bucket, correct s3_bucket_name, or let s3_create_bucket create it",
    "SignatureDoesNotMatch": _CHECK_KEYS,
    "TokenRefreshRequired": _RENEW_CREDENTIALS,
}
_BUCKET_RIGHTS = {
    "CreateBucket": "s3:CreateBucket",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
    "ListObjectsV2": "s3:ListBucket",
}
_OBJECT_RIGHTS = {"AbortMultipartUpload": "s3:AbortMultipartUpload", "DeleteObject": "s3:DeleteObject"}


def _store_error(error: Exception, doing: str, target: str, bucket: Bucket) -> StoreError:
    if isinstance(error, boto.ClientError):
        return _answered(error, doing, target, bucket)
    kind, advice = _unanswered(error, bucket)
    return kind(doing, target, type(error).__name__, None, str(error), advice)


def _answered(error: boto.ClientError, doing: str, target: str, bucket: Bucket) -> StoreError:
    """Error codes: https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html#ErrorCodeList"""
    facts = error.response.get("Error", {})
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    code = facts.get("Code", "") or str(status)
    passes = status >= 500 or status in (408, 429) or code in _TRANSIENT_CODES
    kind = TransientStoreError if passes else PermanentStoreError
    advice = "" if passes else _advice(code, status, error, bucket)
    return kind(doing, target, code, status, facts.get("Message", ""), advice)


def _advice(code: str, status: int, error: boto.ClientError, bucket: Bucket) -> str:
    region = error.response.get("Error", {}).get("Region")
    if code in _ADVICE:
        return _ADVICE[code]
    if code == "RequestTimeTooSkewed":
        return f"{_SET_THE_CLOCK}{_skew(error)}"
    if code in ("AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraintException"):
        return f"set s3_region to {region or 'the region of the bucket'}"
    if "KMS" in code:
        return "check s3_kms_key_id: the key has to be enabled, and in the bucket's region"
    if status == 403:
        return f"allow {_rights(error.operation_name, bucket)}"
    return ""


def _rights(operation: str, bucket: Bucket) -> str:
    """What `operation` needs on this bucket."""
    if operation == "AssumeRole" and bucket.role:
        external = ", with the external id that s3_external_id gives" if bucket.role.external_id else ""
        return f"sts:AssumeRole on {bucket.role.arn}, in the role's trust policy too{external}"
    if operation in _BUCKET_RIGHTS:
        return f"{_BUCKET_RIGHTS[operation]} on arn:aws:s3:::{bucket.name}"
    rights = [_OBJECT_RIGHTS.get(operation, "s3:PutObject")]
    if rights == ["s3:PutObject"]:
        rights += ["s3:PutObjectTagging"] if bucket.tags else []
        rights += ["s3:PutObjectAcl"] if bucket.acl else []
    objects = f"arn:aws:s3:::{'/'.join(filter(None, (bucket.name, bucket.prefix.strip('/'), '*')))}"
    key = ", and kms:GenerateDataKey and kms:Decrypt on the key" if bucket.encryption == "sse-kms" else ""
    return f"{', '.join(rights)} on {objects}{key}"


def _skew(error: boto.ClientError) -> str:
    date = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
    if not date:
        return ""
    seconds = (datetime.now(UTC) - parsedate_to_datetime(date)).total_seconds()
    return f": it is {abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'} the server's"


def _unanswered(error: Exception, bucket: Bucket) -> tuple[type[StoreError], str]:
    match error:
        case boto.SSLError() if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return PermanentStoreError, "let AWS_CA_BUNDLE name the certificates to trust, or correct s3_endpoint"
        case boto.HTTPClientError() | boto.ConnectionError():
            names = ["s3_endpoint"] if bucket.endpoint else ["s3_region"]
            names += ["s3_sts_endpoint"] if bucket.role and bucket.role.sts_endpoint else []
            return TransientStoreError, f"check {', '.join(names)} and the network if this stays"
        case boto.CredentialRetrievalError() | boto.MetadataRetrievalError():
            return TransientStoreError, "check what hands out the credentials if this stays"
        case (
            boto.NoCredentialsError()
            | boto.PartialCredentialsError()
            | boto.ProfileNotFound()
            | boto.TokenRetrievalError()
        ):
            return PermanentStoreError, _GIVE_CREDENTIALS
        case boto.SSOError() | boto.LoginError():
            return PermanentStoreError, _RENEW_CREDENTIALS
    return PermanentStoreError, ""
