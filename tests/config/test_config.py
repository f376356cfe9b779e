"""The config: what composes, what is refused, and in which words."""

from __future__ import annotations

import math
import re
from functools import cache
from itertools import combinations, product
from pathlib import Path

import pytest
import yaml

from agent_lightning.config.learning import AirConfig, CreditConfig, RuleConfig
from agent_lightning.config.load import from_mapping, load, project_folder, reload, resolve_path, to_mapping, to_yaml
from agent_lightning.config.reference import sources
from agent_lightning.config.schema import RENAMED
from agent_lightning.core.errors import ConfigError

CONF = project_folder("conf")


def names(group: str) -> list[str]:
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


REAL = [name for name in names("experiment") if name != "toy"]
"""What trains a model of which vLLM and veRL know; a toy model has a test of its own."""
EXPERIMENTS = ", ".join(names("experiment"))


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(["experiment=calc_tiny", *overrides])
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("algorithm", names("algorithm"))
@pytest.mark.parametrize("experiment", REAL)
def test_every_algorithm_composes_with_every_experiment(experiment: str, algorithm: str) -> None:
    # pass_at_k compares entire rollouts: AIR's rewards count for it, in their sums.
    air = ["air.enabled=true", "credit.pass_at=2"] if algorithm == "pass_at_k" else ["credit=air"]
    config = load([f"experiment={experiment}", f"algorithm={algorithm}", *air])
    assert config.air.enabled
    methods = {"ppo": "gae", "pass_at_k": "identical"}
    assert config.credit.method == methods.get(algorithm, "return_to_go")
    assert config.algorithm.lr == own_lr(experiment)


@cache
def own_lr(experiment: str) -> float:
    return load([f"experiment={experiment}"]).algorithm.lr


MODELS, HARDWARE = [name for name in names("model") if name != "toy"], names("hardware")
PAIRED = [
    (experiment, model, HARDWARE[(row + column) % len(HARDWARE)])
    for row, experiment in enumerate(REAL)
    for column, model in enumerate(MODELS)
]
"""Every pair of an experiment, a model and a hardware, in one row or another."""


def test_every_pair_is_in_a_row() -> None:
    wanted = {*product(REAL, MODELS)} | {*product(REAL, HARDWARE)} | {*product(MODELS, HARDWARE)}
    assert wanted == {pair for row in PAIRED for pair in combinations(row, 2)}


@pytest.mark.parametrize(("experiment", "model", "hardware"), PAIRED)
def test_every_combination_composes(experiment: str, model: str, hardware: str) -> None:
    config = load([f"experiment={experiment}", f"model={model}", f"hardware={hardware}"])
    assert config.experiment == experiment
    assert config.model.path
    assert config.hardware.device == ("cpu" if hardware == "cpu" else "cuda")


@pytest.mark.parametrize("credit", names("credit"))
def test_the_toy_experiment_composes_with_every_credit(credit: str) -> None:
    config = load(["experiment=toy", f"credit={credit}"])
    assert len(config.model.words) == 7


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm=gspo", "algorithm.loss=gspo: a toy model's learner does not read it; leave it out"),
        ("algorithm.kl_coef=0.1", "algorithm.kl_coef=0.1: a toy model's learner does not read it; leave it out"),
        ("algorithm=ppo", "credit: a toy model has no critic and does not normalise over a step; choose others"),
        ("algorithm=dapo", "algorithm.clip_ratio_low and _high: a toy model's learner has one bound for both"),
    ],
)
def test_what_a_toy_learner_would_not_read_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(["experiment=toy", override])
    assert str(caught.value) == message


def test_an_experiment_chooses_its_own_data_and_overrides_come_last() -> None:
    assert load(["experiment=calc_mawps"]).data.train.names == ("mawps_train",)
    config = load(["steps=7", "experiment=calc_mawps", "algorithm.lr=1e-3", "data.root=/some where"])
    assert (config.steps, config.algorithm.lr, config.data.root) == (7, 1e-3, "/some where")


@pytest.mark.parametrize("experiment", ["calc_x", "musique"])
def test_the_full_experiments_have_the_papers_settings(experiment: str) -> None:
    config = load([f"experiment={experiment}"])
    algorithm, train = config.algorithm, config.sampling.train
    assert config.model.path == "meta-llama/Llama-3.2-3B-Instruct"
    assert (algorithm.tasks_per_step, algorithm.rollouts_per_task, algorithm.lr) == (32, 4, 1e-6)
    assert (algorithm.clip_ratio_low, algorithm.clip_ratio_high) == (0.2, 0.3)
    assert (config.model.max_len - train.max_tokens, train.max_tokens) == (4096, 2048)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("serving.port=8000", 8000),
        ("tracking.tags=[a,b]", ["a", "b"]),
        ("algorithm.failures.timeout=null", None),
        ("algorithm.failures.truncated=resample", "resample"),
        ("verl.ulysses_sequence_parallel_size=2", 2),
        ("vllm.max_num_batched_tokens=512", 512),
        ("data.train.num=5", 5),
    ],
)
def test_a_key_that_no_file_names_can_be_set(override: str, value: object) -> None:
    setting: object = to_mapping(load(["experiment=calc_tiny", override]))
    for part in override.partition("=")[0].split("."):
        assert isinstance(setting, dict)
        setting = setting[part]
    assert setting == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.lrr=1", "algorithm.lrr: no such key; did you mean algorithm.lr?"),
        ("lr=1", "lr: no such key; did you mean algorithm.lr?"),
        ("agnt=calc", "agnt: no such key; did you mean agent?"),
        ("+data.train.nme=x", "data.train.nme: no such key; did you mean data.train.name?"),
        ("algorithm.lr=fast", "algorithm.lr=fast: must be a number"),
        ("steps=1.5", "steps=1.5: must be a whole number"),
        ("steps=null", "steps=null: must be a whole number"),
        ("tracking.tensorboard=perhaps", "tracking.tensorboard=perhaps: must be true or false"),
        ("algorithm.rollouts_per_batch=x", "algorithm.rollouts_per_batch=x: must be a whole number or null"),
        ("algorithm.failures.timeout=low", "algorithm.failures.timeout=low: must be a number or null, resample"),
        ("tracking.tags={a: 1}", "tracking.tags={'a': 1}: must be a list; each item text"),
        ("verl=3", "verl=3: must be a mapping"),
        ("sampling=3", "sampling=3: is a section; set one of its keys, such as sampling.train.temperature"),
        ("algorithm=3", f"algorithm=3: unknown; choose one of {', '.join(names('algorithm'))}"),
        ("model.path=???", "model.path: missing; give it a value"),
        ("name=${nowhere}", "name: Interpolation key 'nowhere' not found"),
        ("steps", "steps: must have the form key=value"),
        ("=3", "=3: must have the form key=value"),
        (
            "agent.trained=a,b",
            "agent.trained=a,b: a list is written agent.trained=[a,b]; quote a text that has a comma: "
            """agent.trained='"a,b"'""",
        ),
        ("steps=[1", "steps=[1: cannot be read; quote a value that has special characters"),
        ("hardware=huge", "hardware=huge: unknown; choose one of cluster, cpu, gpu1, gpu2, gpu8"),
        ("experiment=nope", f"experiment=nope: unknown; choose one of {EXPERIMENTS}"),
    ],
)
def test_a_wrong_override_is_one_line_that_says_what_to_do(override: str, message: str) -> None:
    assert refusal(override) == message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.rollouts_per_task=1", "algorithm.rollouts_per_task=1: must be at least 2, to compare them"),
        (
            "credit.pass_at=8",
            "algorithm.rollouts_per_task=8: must be at least 9, to compare the best of credit.pass_at=8",
        ),
        ("critic.warmup_steps=-1", "critic.warmup_steps=-1: must be at least 0"),
        ("algorithm.kl_coef=-1", "algorithm.kl_coef=-1: must be at least 0"),
        ("serving.kv_cache_gib=0", "serving.kv_cache_gib=0: must be at least 1"),
        ("sampling.train.max_tokens=0", "sampling.train.max_tokens=0: must be at least 1"),
        ("serving.port=70000", "serving.port=70000: must be from 0 to 65535"),
        ("hardware.device=tpu", "hardware.device=tpu: must be one of cpu, cuda"),
        ("agent.retry.budget=-1", "agent.retry.budget=-1: must be at least 0"),
        ("agent.breaker.share=0", "agent.breaker.share=0: must be above 0 and at most 1"),
        ("agent.timeout_s=0", "agent.timeout_s=0: must be above 0"),
        ("sampling.train.temperature=-1", "sampling.train.temperature=-1: must be at least 0"),
        ("sampling.val.top_p=0", "sampling.val.top_p=0: must be above 0 and at most 1"),
        ("algorithm.lr=nan", "algorithm.lr=nan: must be a finite number"),
        ("algorithm.lr=true", "algorithm.lr=True: must be a number"),
        ("algorithm.clip_grad=inf", "algorithm.clip_grad=inf: must be a finite number"),
        ("credit.reward_weights.speed=nan", "credit.reward_weights.speed=nan: must be a finite number"),
        ("buffer.max_disk_gib=0.1", "buffer.max_disk_gib=0.1: must be at least 0.125"),
        ("seed=-1", "seed=-1: must be at least 0"),
        ("agent.reward_max=0", "agent.reward_min must be below agent.reward_max"),
    ],
)
def test_a_value_out_of_range_names_the_key(override: str, message: str) -> None:
    needed = ["algorithm=ppo"] if override.startswith("critic") else []
    assert refusal(*needed, override) == message


def test_an_outcome_that_is_no_failure_is_refused() -> None:
    for name in ("timout", "finished"):
        message = refusal(f"algorithm.failures.{name}=0")
        assert message.startswith(f"algorithm.failures.{name}: not a failure; use one of agent_error, ")


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("generated", "path", "x.jsonl"),
        ("generated", "question_field", "q"),
        ("jsonl", "names", ["mawps_train"]),
        ("jsonl", "target", "f.py:make"),
        ("jsonl", "split", "train"),
        ("jsonl", "question_field", "q"),
        ("hub", "names", ["a"]),
    ],
)
def test_a_source_refuses_a_field_that_it_does_not_read(kind: str, field: str, value: object) -> None:
    values = to_mapping(load(["experiment=calc_tiny"]))
    values["data"]["val"] = {"kind": kind, field: value}
    with pytest.raises(ConfigError) as caught:
        from_mapping(values)
    assert str(caught.value) == f"data.val.{field}={value}: not read by kind={kind}; remove it"


def test_a_kind_of_source_that_there_is_not_is_refused() -> None:
    assert refusal("data.train.kind=calcx").startswith("kind=calcx is now data=calcx_mawps; ")
    assert refusal("data.train.kind=csv") == "data.train.kind=csv: must be one of generated, jsonl, hub"


def test_no_experiment_is_one_line_with_the_choices() -> None:
    with pytest.raises(ConfigError, match=f"^experiment: missing; .* {EXPERIMENTS}$"):
        load(["steps=3"])


def test_a_refusal_leaves_nothing_behind() -> None:
    before = load(["experiment=calc_tiny"])
    refusal("steps=[1")
    refusal("algorithm.lrr=1")
    assert load(["experiment=calc_tiny"]) == before


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    config = load(["experiment=calc_tiny", "steps=9", "tracking.tags=[a]", "algorithm.failures.timeout=null"])
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert "# val: what the agent asks for comes first, and these fill the gaps.\n" in file.read_text()
    assert reload(file, []) == config
    assert from_mapping(to_mapping(config)) == config
    assert reload(file, ["steps=12", "algorithm.lr=1e-4"]).steps == 12


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.lrr=1", "algorithm.lrr: no such key; did you mean algorithm.lr?"),
        ("steps=many", "steps=many: must be a whole number"),
        ("steps", "steps: must have the form key=value"),
        ("hardware=gpu2", "hardware=gpu2: is a section; set one of its keys, such as hardware.device"),
        ("experiment=calc_x", "experiment=calc_x: a resumed run keeps its own experiment; leave it out"),
    ],
)
def test_reload_refuses_in_the_same_words(tmp_path: Path, override: str, message: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(load(["experiment=calc_tiny"])))
    with pytest.raises(ConfigError) as caught:
        reload(file, [override])
    assert str(caught.value) == message


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_name_of_a_key_is_refused_with_the_new_one(old: str, new: str) -> None:
    assert refusal(f"{old}=1") == f"{old}: is now {new}"


def test_the_config_of_an_earlier_run_is_read_with_its_old_names(tmp_path: Path) -> None:
    settings = ("data.val_group_by=level", "algorithm.dynamic_sampling_rounds=2", "rollout.unresponsive_timeout_s=9")
    more = ("algorithm.importance_sampling=token", "algorithm.importance_sampling_cap=3", "credit.gae_level=call")
    config = load(["experiment=calc_tiny", "algorithm=ppo", "serving.on_weight_update=keep", *settings, *more])
    text = to_yaml(config)
    for old, new in RENAMED.items():
        text, replaced = re.subn(rf"^  {new.split('.')[1]}:", f"  {old.split('.')[1]}:", text, flags=re.MULTILINE)
        assert replaced == 1
    file = tmp_path / "config.yaml"
    file.write_text(text)
    assert reload(file, []) == config
    assert reload(file, ["rollout.unresponsive_timeout_s=5"]).rollout.unresponsive_timeout_s == 5
    with pytest.raises(ConfigError, match=r"^rollout\.hung_s: is now rollout\.unresponsive_timeout_s$"):
        reload(file, ["rollout.hung_s=5"])


def test_a_value_may_name_any_key_and_keeps_the_dollar_signs_of_a_shell(tmp_path: Path) -> None:
    command = r"agent.target='run \${OPENAI_BASE_URL} C:\\\${X}'"
    config = load(["experiment=calc_tiny", "agent.mode=command", command, "name=${experiment}-${algorithm.clip_grad}"])
    assert (config.agent.target, config.name) == (r"run ${OPENAI_BASE_URL} C:\${X}", "calc_tiny-1.0")
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert reload(file, []) == config


def test_numbers_may_be_given_as_text_and_texts_as_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPS", "7")
    config = load(["experiment=calc_tiny", "steps=${oc.env:STEPS}", "tracking.group=5", "agent.retry.budget=inf"])
    assert (config.steps, config.tracking.group, config.agent.retry.budget) == (7, "5", math.inf)


def test_a_group_of_files_of_your_own_fills_a_section(tmp_path: Path) -> None:
    for name in ("experiment", "rollout"):
        (tmp_path / name).mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nexperiment: mine\n")
    (tmp_path / "rollout" / "many.yaml").write_text("workers: 9\n")
    words = [f"experiment={tmp_path}/experiment/mine.yaml", "rollout=many"]
    assert load(words).rollout.workers == 9
    assert sources(words)[1]["rollout.workers"] == (9, str(tmp_path / "rollout" / "many.yaml"))


@pytest.mark.parametrize("section", ["buffer", "serving", "learner", "rollout", "tracking"])
def test_a_section_that_had_a_file_of_defaults_needs_none(section: str) -> None:
    why = f"the defaults hold without it; leave it out, or set one of the keys of {section}"
    assert refusal(f"{section}=default") == f"{section}=default: {why}"


@pytest.mark.parametrize("text", ["steps: [1", "- a\n- b\n", "stepz: 3\n", "steps: 3\n"])
def test_a_damaged_config_file_is_one_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        reload(file, [])
    assert "\n" not in str(caught.value)


def test_a_path_is_of_the_working_folder_else_of_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_path("examples/calc_x/agent.py") == str(project_folder("examples") / "calc_x" / "agent.py")
    mine = tmp_path / "examples" / "calc_x" / "agent.py"
    mine.parent.mkdir(parents=True)
    mine.touch()
    assert resolve_path("examples/calc_x/agent.py") == str(mine)
    assert resolve_path("some-org/some-model") == "some-org/some-model"


def test_credit_air_gives_each_call_what_it_earned() -> None:
    config = load(["experiment=calc_tiny", "credit=air", "air.form=potential"])
    assert (config.credit.method, config.air.enabled) == ("return_to_go", True)
    assert config.air == AirConfig(enabled=True, form="potential")
    assert config.credit == CreditConfig(method="return_to_go")
    assert not load(["experiment=calc_tiny"]).air.enabled


def test_rules_of_air_are_data() -> None:
    config = load(
        ["experiment=calc_tiny", "air.enabled=true", "air.rules=[{on: error, tool: sql*, value: -0.2, cap: 0.2}]"]
    )
    assert config.air.rules == (RuleConfig(on="error", tool="sql*", value=-0.2, cap=0.2),)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("air.form=potential", "air: its keys are set but it is off; add air.enabled=true, or credit=air"),
        ("credit.discount=0.9", "credit.discount: credit.method=identical does not read it"),
        ("credit.state_weight=2", "credit.state_weight: credit.method=identical does not read it"),
        ("air.bound=0.6", "air.bound=0.6: must be above 0 and below 0.5"),
        ("air.form=mean", "air.form=mean: must be one of sum, potential"),
        ("air.rules=[{on: good, value: 0.1, cap: 0.1}]", "air.rules[0].on=good: must be one of ok, error"),
        ("credit.method=ppo", "credit.method=ppo: must be one of identical, return_to_go, same_state"),
        ("credit.discount=2", "credit.discount=2: must be from 0 to 1"),
        ("credit.gae_lambda=1", "credit.gae_lambda: set, but nothing reads it: only credit.method=gae does"),
        ("credit.gae_level=call", "credit.gae_level: set, but nothing reads it: only credit.method=gae does"),
        ("critic.lr=1", "critic: set, but nothing reads it: only credit.method=gae has a critic"),
        ("credit.method=gae", "credit.method=gae: needs credit.scale=batch or none, and no other credit.baseline"),
        ("credit.baseline=none", "credit.baseline=none: needs credit.scale=batch or none; std is of the group"),
        ("algorithm.kl_in=reward", "algorithm.kl_in: set, but nothing reads it: algorithm.kl_coef is 0"),
        ("algorithm.kl_kind=k1", "algorithm.kl_kind: set, but nothing reads it: algorithm.kl_coef is 0"),
        ("algorithm.kl_kind=k4", "algorithm.kl_kind=k4: must be one of k1, abs, k2, k3"),
        (
            "algorithm.importance_sampling=row",
            "algorithm.importance_sampling=row: must be one of none, token, sequence",
        ),
        (
            "algorithm.importance_sampling_cap=3",
            "algorithm.importance_sampling_cap: set, but nothing reads it: algorithm.importance_sampling is",
        ),
    ],
)
def test_credit_that_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(["experiment=calc_tiny", override])


def test_an_algorithm_and_a_method_that_contradict_are_refused() -> None:
    for method in ("credit=return_to_go", "credit.scale=batch", "algorithm=rloo"):
        assert refusal("credit.pass_at=2", method).startswith("credit.pass_at=2: needs credit.method=identical")
    refused = refusal("algorithm=ppo", "credit=return_to_go")
    assert refused == "credit=return_to_go: the algorithm's is credit.method=gae; leave one out"


def test_without_a_group_to_compare_with_one_rollout_of_a_task_is_enough() -> None:
    for algorithm in ("ppo", "reinforce_plus_plus"):
        config = load(["experiment=calc_tiny", f"algorithm={algorithm}", "algorithm.rollouts_per_task=1"])
        assert config.algorithm.rollouts_per_task == 1


def test_the_tasks_of_an_earlier_calc_mawps_run_are_read(tmp_path: Path) -> None:
    config = load(["experiment=calc_mawps"])
    values = to_mapping(config)
    for split in ("train", "val"):
        values["data"][split] |= {"kind": "calcx", "target": None, "num": None}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    assert reload(file, []) == config
