"""Loading a model directory: what it needs, and what is wrong with one that lacks it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CTRLConfig, CTRLLMHeadModel

from services.lab.tiny_policy import byte_level_tokenizer
from services.learner.config import PolicySection
from services.learner.forward import Forward
from services.learner.model_files import read_model_files
from services.learner.policy import Policy, load_policy
from services.runtime.errors import BadInputError, ConfigError, InputMissingError, InvalidWeightsError
from services.wire.torch_bits import to_torch


def load(directory: Path) -> Policy:
    return load_policy(PolicySection(path=directory, device="cpu"))


@pytest.fixture
def copy(policy_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(policy_dir, tmp_path / "copy"))


def test_masters_are_float32_and_tied_weights_have_one_name(policy_dir: Path) -> None:
    policy = load(policy_dir)
    parameters = policy.parameters()
    assert {tensor.dtype for tensor in parameters.values()} == {torch.float32}
    assert "model.embed_tokens.weight" in parameters
    assert "lm_head.weight" not in parameters
    assert policy.vocab_size == parameters["model.embed_tokens.weight"].shape[0]


def test_wire_weights_are_the_bits_of_the_files(policy_dir: Path) -> None:
    stored = load_file(policy_dir / "model.safetensors")
    sent = to_torch(load(policy_dir).wire_weights())
    assert sent.keys() == stored.keys()
    assert all(torch.equal(sent[name].view(torch.int16), stored[name].view(torch.int16)) for name in stored)


def test_wire_weights_do_not_follow_later_steps(policy_dir: Path) -> None:
    policy = load(policy_dir)
    before = policy.wire_weights()
    kept = {name: tensor.bits.copy() for name, tensor in before.items()}
    with torch.no_grad():
        for tensor in policy.parameters().values():
            tensor.add_(1.0)
    assert all((before[name].bits == kept[name]).all() for name in kept)


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("config.json", InputMissingError, "config.json"),
        ("model.safetensors", InputMissingError, "safetensors"),
        ("tokenizer.json", InputMissingError, "tokenizer"),
        ("chat_template.jinja", ConfigError, "chat template"),
    ],
)
def test_a_missing_file_is_one_sentence(copy: Path, name: str, error: type[Exception], words: str) -> None:
    (copy / name).unlink()
    with pytest.raises(error, match=words):
        read_model_files(copy)


def test_a_tokenizer_of_another_vocabulary_is_refused(copy: Path) -> None:
    """It would ask the embedding for rows that it does not have."""
    byte_level_tokenizer(["3+4=7"] * 50, 300).save_pretrained(copy)
    with pytest.raises(ConfigError, match=r"token ids up to \d+, and the model's embedding has \d+ rows"):
        load(copy)


def test_pickled_weights_are_not_read(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(InputMissingError, match="pickles are not read"):
        load(copy)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_files_that_git_lfs_has_yet_to_fetch_are_told_apart_from_damaged_ones(copy: Path, name: str) -> None:
    (copy / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 988097824\n")
    with pytest.raises(InputMissingError, match=rf"{name} is a pointer of Git LFS .* `git lfs pull`"):
        read_model_files(copy)


def test_a_pointer_in_the_place_of_a_file_that_nobody_reads_is_no_obstacle(copy: Path) -> None:
    (copy / "consolidated.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 988097824\n")
    assert "config.json" in read_model_files(copy)


def test_missing_tensors_are_refused_instead_of_made_up(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidWeightsError, match=r"lack model\.norm\.weight"):
        load(copy)


def test_weights_that_are_not_finite_are_refused(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidWeightsError, match=r"model\.norm\.weight"):
        load(copy)


def test_weights_of_another_size_are_named_with_both_sizes(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(InvalidWeightsError, match=r"down_proj\.weight is \[32, 48\], and the model has \[32, 64\]"):
        load(copy)


def test_weights_that_the_model_does_not_use_are_told_of(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = json.loads((copy / "config.json").read_text())
    fewer = {"num_hidden_layers": 1, "layer_types": config["layer_types"][:1]}
    (copy / "config.json").write_text(json.dumps(config | fewer))
    load(copy)
    assert "weights_not_used" in caplog.messages


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("adapter_config.json", {"peft_type": "LORA"}, "merge it"),
        ("config.json", {"quantization_config": {"quant_method": "fp8"}}, "quantized"),
        ("config.json", {"model_type": "t5"}, "no causal language model"),
        ("config.json", {"model_type": "qwen2_vl"}, "no causal language model"),
        ("config.json", {"hidden_size": "32"}, "config.json .* expected int"),
    ],
)
def test_what_cannot_be_a_policy_is_one_sentence(copy: Path, name: str, value: dict[str, object], words: str) -> None:
    before = json.loads((copy / name).read_text()) if (copy / name).exists() else {}
    (copy / name).write_text(json.dumps(before | value))
    with pytest.raises(ConfigError, match=words):
        load(copy)


def test_a_damaged_generation_config_is_named_before_samplers_read_it(copy: Path) -> None:
    (copy / "generation_config.json").write_text("[1")
    with pytest.raises(BadInputError, match="generation_config"):
        load(copy)


def test_a_chat_template_is_tried_with_the_system_prompt(copy: Path) -> None:
    """Gemma's knows no system message: every sampler would have ended."""
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages[0].content }}"
    )
    (copy / "chat_template.jinja").write_text(template)
    load(copy)
    with pytest.raises(ConfigError, match="no system"):
        load_policy(PolicySection(path=copy, device="cpu"), "Be brief.")


def test_a_chat_template_that_leaves_out_the_question_is_refused(copy: Path) -> None:
    """As one does that wants a message's content in parts."""
    template = "{% for part in messages[0].content if part.type == 'text' %}{{ part.text }}{% endfor %}"
    (copy / "chat_template.jinja").write_text(template)
    with pytest.raises(ConfigError, match="leaves out"):
        load(copy)


def test_damaged_files_are_named(copy: Path) -> None:
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(InvalidWeightsError, match="do not load"):
        load(copy)


def test_an_unknown_architecture_is_a_configuration_error(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "no_such_model", "architectures": ["X"]}))
    with pytest.raises(ConfigError, match="copy"):
        load(copy)


def test_a_device_that_is_not_here_is_a_configuration_error(policy_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"policy\.device"):
        load_policy(PolicySection(path=policy_dir, device="tpu"))


def test_a_plain_head_is_computed_in_chunks(policy_dir: Path) -> None:
    assert Forward(load(policy_dir), temperature=1.0, autocast=False).in_chunks


def kept_for_backward(policy: Policy) -> tuple[int, Tensor]:
    """Numbers that one forward pass keeps, and the embedding's gradient."""
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    ids = torch.arange(48).reshape(4, 12) % policy.vocab_size
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = policy.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    logits.logsumexp(-1).sum().backward()
    gradient = policy.parameters()["model.embed_tokens.weight"].grad
    assert gradient is not None
    return sum(kept), gradient


def test_checkpointed_layers_keep_less_for_the_same_gradient(policy_dir: Path) -> None:
    plain, gradient = kept_for_backward(load(policy_dir))
    settings = PolicySection(path=policy_dir, device="cpu", gradient_checkpointing=True)
    checkpointed, same = kept_for_backward(load_policy(settings))
    assert checkpointed < plain / 2
    assert torch.equal(gradient, same)


def test_a_model_without_layers_to_checkpoint_is_refused(copy: Path) -> None:
    CTRLLMHeadModel(CTRLConfig(vocab_size=64, n_embd=8, n_layer=1, n_head=1, dff=8)).save_pretrained(copy)
    with pytest.raises(ConfigError, match=r"no layers to checkpoint: set policy\.gradient_checkpointing to false"):
        load_policy(PolicySection(path=copy, device="cpu", gradient_checkpointing=True))
