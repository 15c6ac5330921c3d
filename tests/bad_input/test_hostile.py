"""What somebody else wrote runs nothing, leaves its folder nowhere, and learns no secret."""

from __future__ import annotations

import json

import forks
import pytest

from dominie.generation.endpoint import Endpoint


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("models.x.trust_remote_code=true", "models.x.trust_remote_code"),
        ("train.trust_remote_code=true", "train.trust_remote_code"),
        ("data.d.trust_remote_code=true", "data.d.trust_remote_code"),
        ("train.hub_token=hf_abcdef", "HF_TOKEN"),
        ("train.push_to_hub_token=hf_abcdef", "HF_TOKEN"),
        ("name=../../elsewhere", "not usable as a name"),
        ("name=/tmp/elsewhere", "not usable as a name"),
        ("evaluate.baseline=!!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_a_key_that_would_let_somebody_in_is_refused(refused, work, dominie, override, word):
    said = dominie("run", "r.yaml", "models.x.path=m", override)
    refused(said, word)
    assert "hf_abcdef" not in said.out + said.err
    assert not (work / "runs").exists()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  s: {student", "  ../s: {student"),
        ("data: {d: {path", "data: {../d: {path"),
        ("  models: {s: s}", "  models: {../../s: s}"),
        ("  tasks: {t: {source", "  tasks: {../../t: {source"),
    ],
)
def test_a_name_that_is_a_path_is_refused(refused, work, dominie, old, new):
    recipe = (work / "r.yaml").read_text()
    assert old in recipe
    (work / "r.yaml").write_text(recipe.replace(old, new))
    refused(dominie("run", "r.yaml"), "..")
    assert not (work / "runs").exists()


def test_code_beside_a_model_is_not_run(refused, work, dominie):
    marker = work / "was-run"
    (work / "m" / "evil.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import PretrainedConfig as Evil, PreTrainedModel as EvilModel\n"
    )
    config = json.loads((work / "m" / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.EvilModel"}
    config["model_type"] = "evil"
    (work / "m" / "config.json").write_text(json.dumps(config))
    refused(dominie("run", "r.yaml"), "m: ", "--trust-remote-code")
    assert not marker.exists()
    forks.dominie("--trust-remote-code", "run", "r.yaml", cwd=work)  # it leaves classes behind
    assert marker.exists(), "who says so on the command line has it run"


def test_a_secret_does_not_stand_in_a_recipe():
    for field in ("api_key", "Authorization", "x-secret"):
        with pytest.raises(ValueError, match="key_env") as refused:
            Endpoint(endpoint="http://localhost/v1", model="m", request={field: "sk-abcdef"})
        assert "sk-abcdef" not in str(refused.value)
    assert Endpoint(endpoint="http://localhost/v1", model="m", request={"max_tokens": 3})
