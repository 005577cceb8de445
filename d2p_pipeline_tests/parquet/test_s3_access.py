"""Credentials, roles and rights, judged by a server that checks signatures and policies; and what stays secret."""

import io
import json
import logging
import pickle
import re
import socket
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx
import polars as pl
import pytest
from botocore.config import Config
from botocore.session import Session

from d2p_pipeline.parquet.errors import PermanentStoreError, StoreError, TransientStoreError
from d2p_pipeline.parquet.s3 import Bucket, Role, S3Store
from d2p_pipeline_tests.fixtures.s3 import REGION, SECRET_KEY, Answer, Fault, Proxy, Service
from d2p_pipeline_tests.fixtures.s3 import aws_environment as aws_environment
from d2p_pipeline_tests.fixtures.s3 import s3_proxy as s3_proxy
from d2p_pipeline_tests.fixtures.s3 import s3_service as s3_service

pytestmark = pytest.mark.usefixtures("aws_environment")

DOCUMENT = Path(__file__).parents[2] / "docs" / "s3.md"
ROLE = "arn:aws:iam::123456789012:role/writer"
PART = 5 * 2**20
LARGE = bytes(PART + 1)


@pytest.fixture
def bucket(s3_service: Service, s3_proxy: Proxy) -> Bucket:
    return Bucket(s3_service.bucket(), prefix="logs", region=REGION, endpoint=s3_proxy.url, path_style=True)


def open_store(bucket: Bucket, *, attempts: int = 1) -> S3Store:
    return S3Store(bucket, attempts=attempts, part_bytes=PART)


def refused(store: S3Store) -> PermanentStoreError:
    with pytest.raises(PermanentStoreError) as caught:
        store.check()
    return caught.value


# --- rights


@dataclass
class Account:
    """Users and roles of a server that lets them do what their policies say and no more."""

    service: Service
    iam: Any

    def user(self, name: str, rights: Mapping[str, Any] | None) -> tuple[str, str]:
        """A user's access key and secret."""
        self.iam.create_user(UserName=name)
        if rights is not None:
            self.iam.put_user_policy(UserName=name, PolicyName="rights", PolicyDocument=json.dumps(rights))
        key = self.iam.create_access_key(UserName=name)["AccessKey"]
        return key["AccessKeyId"], key["SecretAccessKey"]

    def be_strict(self) -> None:
        httpx.post(f"{self.service.url}/moto-api/reset-auth", content=b"0", verify=False)


@pytest.fixture
def account(s3_service: Service) -> Iterator[Account]:
    iam = Session().create_client(
        "iam", region_name="us-east-1", endpoint_url=s3_service.url, config=Config(retries={"total_max_attempts": 1})
    )
    yield Account(s3_service, iam)
    httpx.post(f"{s3_service.url}/moto-api/reset-auth", content=b"inf", verify=False)


def documented(bucket: Bucket, kind: str) -> dict[str, Any]:
    """The policy or rule that docs/s3.md prints, for this bucket."""
    found = re.search(rf"<!-- {kind} -->\s*```json\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert found
    return json.loads(found[1].replace("BUCKET", bucket.name).replace("PREFIX", bucket.prefix))


def without(policy: dict[str, Any], right: str) -> dict[str, Any]:
    statements = [
        statement | {"Action": [action for action in statement["Action"] if action != right]}
        for statement in policy["Statement"]
    ]
    return policy | {"Statement": [statement for statement in statements if statement["Action"]]}


def sign_in(patch: pytest.MonkeyPatch, keys: tuple[str, str]) -> None:
    patch.setenv("AWS_ACCESS_KEY_ID", keys[0])
    patch.setenv("AWS_SECRET_ACCESS_KEY", keys[1])


def test_the_documented_policies_suffice(
    s3_service: Service, account: Account, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = account.user("writer-all", documented(bucket, "writer"))
    reader = account.user("reader-all", documented(bucket, "reader"))
    account.be_strict()
    sign_in(monkeypatch, writer)
    store = open_store(bucket)
    store.check()
    store.write("capability=a b%2F/small.parquet", b"small")
    store.write("capability=a b%2F/large.parquet", LARGE)
    sign_in(monkeypatch, reader)
    assert len(open_store(bucket).scan()) == 2


def test_the_documented_lifecycle_rule_is_one(s3_service: Service, bucket: Bucket) -> None:
    rules = documented(bucket, "lifecycle")
    s3_service.client.put_bucket_lifecycle_configuration(Bucket=bucket.name, LifecycleConfiguration=rules)
    [rule] = s3_service.client.get_bucket_lifecycle_configuration(Bucket=bucket.name)["Rules"]
    assert rule["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 2}


@pytest.mark.parametrize(
    "right",
    ["s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload", "s3:ListBucketMultipartUploads"],
)
def test_the_check_names_the_right_that_is_missing(
    account: Account, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, right: str
) -> None:
    keys = account.user(f"writer-without-{right[3:]}", without(documented(bucket, "writer"), right))
    account.be_strict()
    sign_in(monkeypatch, keys)
    error = refused(open_store(bucket))
    assert (error.code, error.status) == ("AccessDenied", 403)
    assert error.advice.startswith(f"allow {right} on arn:aws:s3:::{bucket.name}")


def test_a_role_is_assumed_with_its_external_id_or_the_error_names_what_to_allow(
    s3_proxy: Proxy, account: Account, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_assume = {"Effect": "Allow", "Action": "sts:AssumeRole", "Resource": "*"}
    keys = account.user("assumer", {"Version": "2012-10-17", "Statement": [may_assume]})
    trust = {
        "Effect": "Allow",
        "Principal": {"AWS": "arn:aws:iam::123456789012:user/assumer"},
        "Action": "sts:AssumeRole",
        "Condition": {"StringEquals": {"sts:ExternalId": "the right id"}},
    }
    document = json.dumps({"Version": "2012-10-17", "Statement": [trust]})
    account.iam.create_role(RoleName="writer", AssumeRolePolicyDocument=document)
    policy = documented(bucket, "writer")
    account.iam.put_role_policy(RoleName="writer", PolicyName="rights", PolicyDocument=json.dumps(policy))
    account.be_strict()
    sign_in(monkeypatch, keys)
    role = Role(ROLE, session_name="night-shift", sts_endpoint=s3_proxy.url)

    error = refused(open_store(replace(bucket, role=replace(role, external_id="a wrong id"))))
    assert error.code == "AccessDenied"
    assert f"allow sts:AssumeRole on {ROLE}, in the role's trust policy too" in error.advice
    assert "s3_external_id" in error.advice

    open_store(replace(bucket, role=replace(role, external_id="the right id"))).check()
    assert b"RoleSessionName=night-shift" in s3_proxy.of("AssumeRole")[-1].body
    assert {request.access_key[:4] for request in s3_proxy.of("PutObject")} == {"ASIA"}


def test_wrong_keys_are_told_from_missing_rights(
    account: Account, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, _ = account.user("nobody", None)
    account.be_strict()
    assert refused(open_store(bucket)).code == "InvalidAccessKeyId"
    sign_in(monkeypatch, (key, "not the secret"))
    error = refused(open_store(bucket))
    assert error.code == "SignatureDoesNotMatch"
    assert "AWS_SECRET_ACCESS_KEY" in error.advice


# --- credentials


def test_a_role_is_assumed_once_and_again_before_its_session_ends(s3_proxy: Proxy, bucket: Bucket) -> None:
    store = open_store(replace(bucket, role=Role(ROLE, sts_endpoint=s3_proxy.url)))
    for number in range(3):
        store.write(f"{number}.parquet", b"")
    assert s3_proxy.operations().count("AssumeRole") == 1

    s3_proxy.rewrite("AssumeRole", lambda answer: with_expiration(answer, timedelta(minutes=5)))
    store = open_store(replace(bucket, role=Role(ROLE, sts_endpoint=s3_proxy.url)))
    for number in range(3):
        store.write(f"{number}.parquet", b"")
    assert len({request.access_key for request in s3_proxy.of("PutObject")[3:]}) == 3
    assert store.storage_options()["aws_session_token"]


def with_expiration(answer: bytes, left: timedelta) -> bytes:
    ends = (datetime.now(UTC) + left).strftime("%Y-%m-%dT%H:%M:%SZ").encode()
    return re.sub(b"<Expiration>.*?</Expiration>", b"<Expiration>" + ends + b"</Expiration>", answer)


def test_a_session_that_has_ended_when_it_begins_points_at_the_clock(s3_proxy: Proxy, bucket: Bucket) -> None:
    s3_proxy.rewrite("AssumeRole", lambda answer: with_expiration(answer, timedelta(hours=-1)))
    error = refused(open_store(replace(bucket, role=Role(ROLE, sts_endpoint=s3_proxy.url))))
    assert error.advice == "set this machine's clock"


def test_readers_get_the_credentials_of_the_role(s3_service: Service, s3_proxy: Proxy, bucket: Bucket) -> None:
    pl.DataFrame({"x": [1]}).write_parquet(file := io.BytesIO())
    store = open_store(replace(bucket, role=Role(ROLE, sts_endpoint=s3_proxy.url)))
    store.write("x.parquet", file.getvalue())
    assert pl.scan_parquet(store.scan(), storage_options=store.storage_options()).collect().height == 1
    assert {request.access_key[:4] for request in s3_proxy.seen if request.operation != "AssumeRole"} == {"ASIA"}


def test_a_profile_gives_credentials_and_region(
    s3_proxy: Proxy, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config"
    file.write_text("[profile p]\nregion = eu-north-1\naws_access_key_id = AKPROFILE\naws_secret_access_key = s\n")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(file))
    monkeypatch.setenv("AWS_PROFILE", "p")
    store = open_store(replace(bucket, region=None))
    store.write("x.parquet", b"")
    assert s3_proxy.of("PutObject")[0].access_key == "AKPROFILE"
    assert store.storage_options()["aws_region"] == "eu-north-1"


def test_a_web_identity_gives_credentials(
    s3_proxy: Proxy, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a Kubernetes service account has it."""
    (tmp_path / "token").write_text("a token of the cluster")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setenv("AWS_ROLE_ARN", ROLE)
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", s3_proxy.url)
    monkeypatch.setenv("AWS_REGION", REGION)
    store = open_store(replace(bucket, region=None))
    store.write("x.parquet", b"")
    assert store.storage_options()["aws_region"] == REGION
    assert s3_proxy.operations() == ["AssumeRoleWithWebIdentity", "PutObject"]
    assert s3_proxy.of("PutObject")[0].access_key.startswith("ASIA")


@pytest.mark.parametrize(
    ("variables", "code"),
    [
        ({"AWS_ACCESS_KEY_ID": ""}, "NoCredentialsError"),
        ({"AWS_SECRET_ACCESS_KEY": ""}, "PartialCredentialsError"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_PROFILE": "nowhere"}, "ProfileNotFound"),
    ],
)
def test_a_store_without_credentials_cannot_be_opened(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], code: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PermanentStoreError, match="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE") as caught:
        open_store(bucket)
    assert caught.value.code == code


# --- the check


def test_a_check_leaves_nothing_behind(s3_service: Service, bucket: Bucket) -> None:
    open_store(bucket).check()
    assert s3_service.keys(bucket.name) == []
    assert s3_service.unfinished(bucket.name) == []


def test_a_missing_bucket_is_an_error_unless_it_may_be_created(
    s3_service: Service, s3_proxy: Proxy, bucket: Bucket
) -> None:
    missing = replace(bucket, name=f"{bucket.name}-missing")
    error = refused(open_store(missing))
    assert (error.code, error.status) == ("NoSuchBucket", 404)
    assert "s3_create_bucket" in error.advice
    assert "CreateBucket" not in s3_proxy.operations()
    open_store(replace(missing, create=True)).check()
    assert b"<LocationConstraint>eu-central-1</LocationConstraint>" in s3_proxy.of("CreateBucket")[0].body
    open_store(replace(missing, create=True)).check()
    assert len(s3_proxy.of("CreateBucket")) == 1


def test_the_first_region_is_not_named_when_a_bucket_is_created(s3_proxy: Proxy, bucket: Bucket) -> None:
    open_store(replace(bucket, name=f"{bucket.name}-first", region="us-east-1", create=True)).check()
    assert s3_proxy.of("CreateBucket")[0].body == b""


def test_an_endpoint_that_cannot_be_reached_is_named(bucket: Bucket) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(TransientStoreError, match=f"{url}.*; check s3_endpoint and the network if this stays"):
        open_store(replace(bucket, endpoint=url)).check()


def test_a_wrong_region_is_answered_with_the_right_one(s3_proxy: Proxy, bucket: Bucket) -> None:
    answer = Answer(400, "AuthorizationHeaderMalformed", extra="<Region>ap-south-1</Region>")
    s3_proxy.break_next("PutObject", answer, times=2)
    assert refused(open_store(bucket)).advice == "set s3_region to ap-south-1"


def test_a_wrong_clock_is_measured(s3_proxy: Proxy, bucket: Bucket) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    s3_proxy.break_next("PutObject", Answer(403, "RequestTimeTooSkewed", headers={"Date": date}))
    advice = refused(open_store(bucket)).advice
    found = re.fullmatch(r"set this machine's clock: it is (\d+) s behind the server's", advice)
    assert found
    assert 3000 < int(found[1]) <= 3600


@pytest.mark.parametrize(
    ("answer", "advice"),
    [
        (Answer(400, "AccessControlListNotSupported"), "s3_acl"),
        (Answer(400, "InvalidStorageClass"), "s3_storage_class"),
        (Answer(400, "KMS.DisabledException"), "s3_kms_key_id"),
        (Answer(400, "InvalidToken"), "AWS_ACCESS_KEY_ID"),
        (Answer(403, "AccessDenied"), "s3:PutObject, s3:PutObjectTagging, s3:PutObjectAcl on arn"),
        (Answer(403, "AccessDenied"), "kms:GenerateDataKey"),
        (Answer(403, "SomethingOfAnotherService"), "s3:PutObject"),
    ],
)
def test_the_advice_names_the_setting_or_the_rights(
    s3_proxy: Proxy, bucket: Bucket, answer: Answer, advice: str
) -> None:
    s3_proxy.break_next("PutObject", answer)
    dressed = replace(bucket, tags=(("a", "b"),), acl="private", encryption="sse-kms")
    assert advice in refused(open_store(dressed)).advice


def test_an_answer_that_says_nothing_is_judged_by_its_status(s3_proxy: Proxy, bucket: Bucket) -> None:
    for status, kind in ((503, TransientStoreError), (429, TransientStoreError), (403, PermanentStoreError)):
        s3_proxy.break_next("PutObject", Answer(status, ""))
        with pytest.raises(kind, match=str(status)):
            open_store(bucket).write("x.parquet", b"")


# --- secrets


def test_no_secret_is_in_any_text(s3_proxy: Proxy, bucket: Bucket, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    store = open_store(replace(bucket, role=Role(ROLE, sts_endpoint=s3_proxy.url)))
    said = [repr(store), str(vars(store)), repr(bucket)]
    faults: list[Fault] = ["403", "expired", "reset", Answer(403, "SignatureDoesNotMatch")]
    for fault in faults:
        s3_proxy.break_next("PutObject", fault)
        with pytest.raises(StoreError) as caught:
            store.write("x.parquet", b"")
        said += [repr(caught.value), "".join(traceback.format_exception(caught.value))]
    store.write("x.parquet", LARGE)
    store.scan()
    options = store.storage_options()
    secrets = [SECRET_KEY, options["aws_secret_access_key"], options["aws_session_token"]]
    text = "\n".join([*said, caplog.text])
    assert "s3://" in text
    assert "PUT /" in text  # the log is of every detail
    assert [secret for secret in secrets if secret in text] == []


@pytest.mark.parametrize("kind", [TransientStoreError, PermanentStoreError])
def test_an_error_keeps_its_facts_between_processes(kind: type[StoreError]) -> None:
    error = kind("write", "s3://b/k", "SlowDown", 503, "Please reduce your request rate.", "wait")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == "cannot write s3://b/k: SlowDown (503): Please reduce your request rate; wait"
    assert (type(copy), vars(copy)) == (kind, vars(error))
