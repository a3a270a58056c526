"""What must be there before a cloud is called: credentials, by each cloud's own conventions, and Ray's processes here."""

from __future__ import annotations

from pathlib import Path

import pytest

from xcloud.cloud.cluster_file import parse_cluster, read_cluster
from xcloud.cloud.launcher import credential_problems, end_local, local_address
from xcloud.errors import PlacementError

CLUSTERS = Path(__file__).parents[2] / "clusters"


def missing(name: str, environ: dict[str, str]) -> list[str]:
    found = map(str, credential_problems(read_cluster(CLUSTERS / f"{name}.yaml"), environ))
    return [problem for problem in found if "Ray needs packages" not in problem]


@pytest.mark.parametrize(
    ("cloud", "file", "variables"),
    [
        ("aws", None, {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}),
        ("aws", None, {"AWS_WEB_IDENTITY_TOKEN_FILE": "/t"}),
        ("aws", None, {"AWS_CONTAINER_CREDENTIALS_RELATIVE_URI": "/c"}),
        ("aws", ".aws/credentials", {}),
        ("aws", ".aws/config", {}),
        ("aws", "mine", {"AWS_SHARED_CREDENTIALS_FILE": "HOME/mine"}),
        ("gcp", "key.json", {"GOOGLE_APPLICATION_CREDENTIALS": "HOME/key.json"}),
        ("gcp", ".config/gcloud/application_default_credentials.json", {}),
        ("gcp", "conf/application_default_credentials.json", {"CLOUDSDK_CONFIG": "HOME/conf"}),
        ("azure", ".azure/azureProfile.json", {}),
        ("azure", "az/azureProfile.json", {"AZURE_CONFIG_DIR": "HOME/az"}),
    ],
)
def test_credentials_are_looked_for_where_each_cloud_keeps_them(
    cloud: str, file: str | None, variables: dict[str, str], tmp_path: Path
) -> None:
    environ = {"HOME": str(tmp_path)}
    (problem,) = missing(cloud, environ)
    assert problem.startswith(
        f"{CLUSTERS}/{cloud}.yaml: provider.type: credentials for {cloud} are missing: "
    )
    environ |= {name: value.replace("HOME", str(tmp_path)) for name, value in variables.items()}
    if file is not None:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    assert missing(cloud, environ) == []


def test_each_cloud_of_a_file_over_several_is_asked_for(tmp_path: Path) -> None:
    told = missing("multi_cloud", {"HOME": str(tmp_path)})
    for cloud in ("aws", "gcp", "azure"):
        assert any(f"provider.clouds.{cloud}.provider.type: credentials for {cloud}" in line for line in told)


def test_a_named_key_file_must_be_there(tmp_path: Path) -> None:
    text = (CLUSTERS / "on_prem.yaml").read_text(encoding="utf-8")
    cluster = parse_cluster(text.replace("~/.ssh/id_ed25519", str(tmp_path / "key")), Path("on_prem.yaml"))
    (problem,) = map(str, credential_problems(cluster, {}))
    assert problem == f"on_prem.yaml: auth.ssh_private_key: {tmp_path}/key: no such file"
    (tmp_path / "key").touch()
    assert credential_problems(cluster, {}) == []


def test_only_processes_of_the_files_own_address_are_ended() -> None:
    """Nothing listens on this port, so nothing is ended, whatever Ray runs here beside."""
    text = (CLUSTERS / "local.yaml").read_text(encoding="utf-8")
    cluster = parse_cluster(text.replace("6399", "6397"), Path("local.yaml"))
    assert local_address(cluster) == "127.0.0.2:6397"
    assert end_local(cluster) == 0
    with pytest.raises(PlacementError, match=r"local\.yaml: head_start_ray_commands: no `ray start --head"):
        local_address(parse_cluster(text.replace("--port=6399", ""), Path("local.yaml")))
