"""API keys: the file, the check, what a key may do in a minute, and the verb."""

import json
import stat
from pathlib import Path

import pytest
import yaml
from policies import Ticking
from typer.testing import CliRunner

from star_elastic.cli.keys import keys_app
from star_elastic.serve.keys import Key, Keys, KeysError, Limit, digest_of, new_key
from star_elastic.serve.policy import Refused

ANNA, BOB = "se-anna", "se-bob"
ENTRIES = [
    {"name": "anna", "sha256": digest_of(ANNA), "tier": "gold", "admin": True},
    {"name": "bob", "sha256": digest_of(BOB), "requests_per_minute": 2, "budget_per_minute": 9},
]


def written(path: Path, entries: object) -> Path:
    path.write_text(yaml.safe_dump(entries) if path.suffix == ".yaml" else json.dumps(entries))
    return path


@pytest.mark.parametrize("name", ["keys.yaml", "keys.json"])
def test_a_key_is_found_by_itself_only(tmp_path: Path, name: str) -> None:
    keys = Keys.read(written(tmp_path / name, ENTRIES))
    anna, bob = keys.check(ANNA), keys.check(BOB)
    assert anna and bob and (anna.name, bob.name, len(keys)) == ("anna", "bob", 2)
    assert anna.admin and anna.tier == "gold" and not bob.admin and bob.requests_per_minute == 2
    for wrong in (None, "", "anna", ANNA + " ", ANNA[:-1], digest_of(ANNA), "\ud800", "é" * 9999):
        assert keys.check(wrong) is None


def test_the_empty_key_is_nobodys() -> None:
    keys = Keys([Key(name="x", sha256=digest_of(""))])
    assert keys.check("") is None and keys.check(None) is None


def test_every_entry_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the time does not tell whose key it nearly was, or where in the file it stands."""
    import hmac

    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(b) or real(a, b))
    keys = Keys([Key.model_validate(entry) for entry in ENTRIES])
    for presented in (ANNA, BOB, "other", None):
        compared.clear()
        keys.check(presented)
        assert len(compared) == 2


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "no keys; `star-elastic keys new"),
        (None, "no keys"),
        ({"name": "x"}, "not a list of entries"),
        (["x"], "entry 1: Input should be a valid dictionary"),
        ([{"name": "x"}], "entry 1: sha256: not 64 lower-case"),
        ([{"sha256": "0" * 64}], "entry 1: name: Field required"),
        ([{"name": "a b", "sha256": "0" * 64}], r"entry 1: name: .*'a b'"),
        ([{"name": "a\nb", "sha256": "0" * 64}], r"entry 1: name: .*"),
        ([{"name": "a\n", "sha256": "0" * 64}], r"entry 1: name: .*"),
        ([{**ENTRIES[0], "rpm": 3}], "entry 1: unknown field 'rpm'; known are name, sha256"),
        ([{**ENTRIES[0], "admin": "yes"}], "entry 1: admin: .* boolean .*got 'yes'"),
        ([{**ENTRIES[0], "requests_per_minute": 0}], "requests_per_minute: .* greater than 0"),
        ([{**ENTRIES[0], "requests_per_minute": True}], "requests_per_minute: .* integer"),
        ([{**ENTRIES[0], "tokens_per_minute": 1.5}], "tokens_per_minute: .*got 1.5"),
        ([{**ENTRIES[0], "budget_per_minute": float("inf")}], "budget_per_minute: .* finite"),
        ([ENTRIES[0], {**ENTRIES[1], "name": "anna"}], "entry 2: name: anna is that of another"),
        ([*ENTRIES, {**ENTRIES[0], "name": "c"}], "entry 3: sha256: [0-9a-f]{64} is that of ano"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, entries: object, message: str) -> None:
    path = written(tmp_path / "keys.yaml", entries)
    with pytest.raises(KeysError, match=message) as caught:
        Keys.read(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_key_put_in_the_file_by_mistake_is_not_shown(tmp_path: Path) -> None:
    key = new_key()
    with pytest.raises(KeysError) as caught:
        Keys.read(written(tmp_path / "keys.yaml", [{"name": "x", "sha256": key}]))
    assert key not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["- {name: a", "\x00", "- !!python/object/apply:os.system [id]", "[" * 5000, "\udcff"],
    ids=["cut", "nul", "object", "deep", "bytes"],
)
def test_a_file_of_something_else(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(KeysError, match="neither YAML nor JSON"):
        Keys.read(tmp_path / "keys.yaml")


def test_a_field_twice(tmp_path: Path) -> None:
    text = f"- name: a\n  sha256: {'0' * 64}\n  admin: false\n  admin: true\n"
    (tmp_path / "keys.yaml").write_text(text)
    with pytest.raises(KeysError, match="line 1: 'admin' is there twice"):
        Keys.read(tmp_path / "keys.yaml")
    with pytest.raises(OSError):
        Keys.read(tmp_path / "other.yaml")


def test_keys_are_random() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(key.startswith("se-") and len(key) == 46 for key in keys)


def test_requests_of_a_minute() -> None:
    clock = Ticking()
    limit = Limit(Key(name="a", sha256="0" * 64, requests_per_minute=2), clock)
    limit.admit(10**9)
    limit.admit(0)
    with pytest.raises(Refused, match="this key has 2 requests a minute") as caught:
        limit.admit(0)
    assert caught.value.retry_after_s == 30
    clock.now += 30
    limit.admit(0)


def test_tokens_of_a_minute() -> None:
    clock = Ticking()
    key = Key(name="a", sha256="0" * 64, requests_per_minute=3, tokens_per_minute=600)
    limit = Limit(key, clock)
    limit.admit(500)
    with pytest.raises(Refused) as caught:
        limit.admit(110)
    assert caught.value.retry_after_s == 1
    limit.give_back(400)
    limit.admit(500)
    with pytest.raises(Refused, match="601 tokens in one request") as caught:
        limit.admit(601)
    assert caught.value.retry_after_s is None
    limit.admit(0)  # what was refused was not booked


def test_who_has_limits() -> None:
    keys = Keys([Key.model_validate(entry) for entry in ENTRIES])
    assert list(keys.limits(Ticking())) == ["bob"]
    assert keys.budgets(Ticking())["bob"].per_minute == 9


def run(*words: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(keys_app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    if code:
        assert isinstance(result.exception, ValueError | OSError)
        return str(result.exception)
    return result.stdout


def test_the_verb(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    anna = run("new", "anna", "--file", file, "--tier", "gold", "--admin").strip()
    bob = run("new", "bob", "--file", file, "--requests-per-minute", "60").strip()
    keys = Keys.read(file)
    assert [key.name for key in keys] == ["anna", "bob"]
    found = keys.check(bob)
    assert found and found.requests_per_minute == 60 and not found.admin
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert anna not in file.read_text() and bob not in file.read_text()
    listed = run("list", "--file", file)
    assert "anna" in listed and "gold" in listed and "60" in listed and anna not in listed

    before = file.read_bytes()
    assert "entry 3: name: anna is that of" in run("new", "anna", "--file", file, code=1)
    assert str(file) in run("new", "a b", "--file", file, code=1)
    assert "no key is called carl" in run("remove", "carl", "--file", file, code=1)
    assert file.read_bytes() == before

    run("remove", "anna", "--file", file)
    keys = Keys.read(file)
    assert keys.check(anna) is None and keys.check(bob)
    run("remove", "bob", "--file", file)
    with pytest.raises(KeysError, match="no keys"):
        Keys.read(file)
    run("new", "carl", "--file", file)
    assert [path.name for path in tmp_path.iterdir()] == ["keys.yaml"]
