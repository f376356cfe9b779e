"""What `agl config` and docs/config.md say about the keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent_lightning.config import reference
from agent_lightning.config.load import project_folder, reload
from agent_lightning.config.schema import Config
from agent_lightning.config.section import keys, sections
from agent_lightning.core.errors import ConfigError

PAGE = project_folder("docs") / "config.md"


def test_the_page_is_what_the_sections_say() -> None:
    command = "python -m agent_lightning.config.reference > docs/config.md"
    assert PAGE.read_text() == reference.markdown(), f"write it anew: {command}"
    assert command in PAGE.read_text()


def test_every_key_has_a_sentence() -> None:
    short = {key.path: key.sentence for key in keys(Config) if not key.sentence.endswith(".") or len(key.sentence) < 15}
    assert not short


def test_every_section_has_a_sentence_and_a_place_on_the_page() -> None:
    page = PAGE.read_text()
    for path, kind in sections(Config):
        assert (kind.__doc__ or "").rstrip().endswith(".")
        assert f"\n## {path}\n" in page


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("algorithm.lr", "algorithm.lr: a number, at least 0; default 1e-06\n  Learning rate of the policy.\n"),
        ("agent.target", "agent.target: text; must be given\n  "),
        ("sampling.val.temperature", "sampling.val.temperature: a number, at least 0; default 0.0\n"),
        ("algorithm.kl_kind", "algorithm.kl_kind: one of k1, abs, k2, k3, or null; default null\n"),
        ("serving.port", "serving.port: a whole number, from 0 to 65535; default 0\n"),
        ("algorithm.failures.timeout", "algorithm.failures.timeout: a number or null, resample; default 0.0\n"),
        ("credit", "credit: How rewards become the advantage of each model call; docs/credit.md has the formulas.\n"),
    ],
)
def test_a_key_is_explained_with_its_values_and_its_default(path: str, text: str) -> None:
    assert reference.show([path]).startswith(text)


def test_without_a_word_every_key_is_explained_and_no_experiment_is_needed() -> None:
    text = reference.show([])
    titles = [line for line in text.splitlines() if "; default " in line or "; must be given" in line]
    assert [title.partition(":")[0] for title in titles] == [key.path for key in keys(Config)]
    assert all(f"\n  {key.sentence}\n" in text for key in keys(Config))
    for options in ({"changed": True}, {"as_yaml": True}):
        with pytest.raises(ConfigError, match=r"^experiment: missing; give experiment=NAME"):
            reference.show([], **options)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("lr", "lr: no such key; did you mean algorithm.lr?"),
        ("data.strata", "data.strata: is now data.val_group_by"),
        ("quux", "quux: no such key; `agl config` lists all keys"),
    ],
)
def test_a_key_that_does_not_exist_is_refused(path: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        reference.show([path])
    assert str(caught.value) == message


def test_the_table_is_not_cut_when_it_goes_into_a_pipe() -> None:
    long = "x" * 300
    table = reference.show(["experiment=toy", f"agent.reward={long}"], changed=True)
    assert long in table
    assert "serving.port" not in table


def test_the_entire_config_as_yaml_can_be_read_again(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(reference.show(["experiment=toy", "steps=3"], as_yaml=True))
    assert reload(file, []).steps == 3
