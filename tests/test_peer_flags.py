"""Flags that a person brings along from diffusers' and kohya's trainers: they act, or a line says what is so here."""

import pytest
import torch

from dreambooth.command_line import parser
from dreambooth.command_line.console import UserError
from dreambooth.command_line.flags import ALWAYS_SO, NOT_HERE, Flags
from dreambooth.data.schedule import plan
from dreambooth.model.components import load_tokenizer
from dreambooth.model.pipeline import load_part
from dreambooth.model.precision import sampling_dtype
from dreambooth.model.prompts import check_max_length
from dreambooth.model.stable_diffusion import STABLE_DIFFUSION
from dreambooth.run import stages

# Of diffusers' examples/dreambooth/train_dreambooth.py, in autumn 2026.
DIFFUSERS = """
adam_beta1 adam_beta2 adam_epsilon adam_weight_decay allow_tf32 center_crop checkpointing_steps checkpoints_total_limit
class_data_dir class_labels_conditioning class_prompt dataloader_num_workers enable_xformers_memory_efficient_attention
gradient_accumulation_steps gradient_checkpointing hub_model_id hub_token instance_data_dir instance_prompt
learning_rate local_rank logging_dir lr_num_cycles lr_power lr_scheduler lr_warmup_steps max_grad_norm max_train_steps
mixed_precision num_class_images num_train_epochs num_validation_images offset_noise output_dir
pre_compute_text_embeddings pretrained_model_name_or_path prior_generation_precision prior_loss_weight push_to_hub
report_to resolution resume_from_checkpoint revision sample_batch_size scale_lr seed set_grads_to_none
skip_save_text_encoder snr_gamma text_encoder_use_attention_mask tokenizer_max_length tokenizer_name train_batch_size
train_text_encoder use_8bit_adam validation_images validation_prompt validation_scheduler validation_steps variant
with_prior_preservation
""".split()


def parse(tmp_path, *words):
    required = ["--pretrained_model_name_or_path", "model", "--instance_data_dir", str(tmp_path)]
    output = ["--instance_prompt", "a sks dog", "--output_dir", str(tmp_path / "out")]
    return parser.parse(Flags, [*required, *output, *words])


def test_every_flag_of_diffusers_is_known():
    options = parser.build_parser(Flags, "")._option_string_actions
    assert {name for name in DIFFUSERS if f"--{name}" not in options} == NOT_HERE.keys()


@pytest.mark.parametrize("name", NOT_HERE)
def test_what_is_not_here_is_told_with_what_to_do(name, tmp_path):
    for words in ([f"--{name}"], [f"--{name}", "timesteps"], [f"--{name}=timesteps"]):
        with pytest.raises(UserError, match=f"^--{name}: .*; (leave it out|--validation_prompt)") as error:
            parse(tmp_path, *words)
        assert error.value.status == 2


def test_other_words_are_unrecognized(tmp_path):
    with pytest.raises(UserError, match=r"unrecognized arguments: --magic 7 \(see --help\)"):
        parse(tmp_path, "--magic", "7")


@pytest.mark.parametrize("words", [["--hub-token", "abc"], ["--hub-token=abc"], ["hf_abc"], ["--to=hf_abc"]], ids=str)
def test_a_token_behind_a_mistyped_flag_is_not_told(words, tmp_path):
    with pytest.raises(UserError, match="unrecognized arguments: ") as error:
        parse(tmp_path, *words)
    assert "abc" not in str(error.value)


@pytest.mark.parametrize("name", ALWAYS_SO)
def test_what_is_always_so_is_accepted_with_a_word(name, tmp_path, capsys):
    parse(tmp_path, f"--{name}")
    assert f"warning: --{name}: no effect, {ALWAYS_SO[name]}" in capsys.readouterr().err


def test_embeddings_that_are_not_computed_before(tmp_path):
    with pytest.raises(
        UserError, match="--pre_compute_text_embeddings: with --train_text_encoder prompts are encoded"
    ):
        parse(tmp_path, "--pre_compute_text_embeddings", "--train_text_encoder")


def test_offset_noise_is_a_noise_offset(tmp_path):
    assert parse(tmp_path).training.noise_offset == 0
    assert parse(tmp_path, "--offset_noise") == parse(tmp_path, "--noise_offset", "0.1")
    for words in (["--offset_noise", "--noise_offset", "0.2"], ["--noise_offset=0.2", "--offset_noise"]):
        with pytest.raises(UserError, match="not allowed with argument"):
            parse(tmp_path, *words)


def test_cuda_graphs_alone_is_on(tmp_path):
    assert [
        parse(tmp_path, *words).training.cuda_graphs
        for words in ([], ["--cuda_graphs"], ["--cuda_graphs", "off"], ["--cuda_graphs", "auto"])
    ] == ["auto", "on", "off", "auto"]


def test_cache_latents_alone_is_on(tmp_path):
    found = [
        parse(tmp_path, *words).instance.cache_latents
        for words in ([], ["--cache_latents"], ["--cache_latents", "off"])
    ]
    assert found == ["auto", "on", "off"]


def test_the_precision_of_class_images(tmp_path, monkeypatch, capsys):
    dtypes = {"no": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16}
    for requested, dtype in dtypes.items():
        prior = parse(tmp_path, "--prior_generation_precision", requested).prior
        assert sampling_dtype("fp16", prior.prior_generation_precision) == dtype
    assert "--prior_generation_precision: no effect without --with_prior_preservation" in capsys.readouterr().err
    assert sampling_dtype("bf16") == (torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--prior_generation_precision fp16 needs a CUDA GPU"):
        sampling_dtype("no", "fp16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an old card")
    with pytest.raises(UserError, match="--prior_generation_precision bf16: an old card cannot compute in bf16"):
        sampling_dtype("fp16", "bf16")
    assert sampling_dtype("fp16", "fp16") == sampling_dtype("fp16") == torch.float16


def test_a_length_of_prompts_is_what_is_read(tiny_model, capsys):
    readers = [(load_tokenizer(tiny_model / "tokenizer"), load_part(STABLE_DIFFUSION, "text_encoder", tiny_model))]
    check_max_length(None, readers)
    assert capsys.readouterr().err == ""
    check_max_length(77, readers)
    assert "--tokenizer_max_length 77: no effect" in capsys.readouterr().err
    with pytest.raises(UserError, match="--tokenizer_max_length 128: this model reads 77 tokens of a prompt"):
        check_max_length(128, readers)


@pytest.mark.parametrize(
    ("warmup", "length", "told"),
    [
        (5, ["--max_train_steps", "5"], "a run of 5 steps ends before --learning_rate is reached"),
        (4, ["--max_train_steps", "5"], ""),
        (6, ["--num_train_epochs", "3", "--train_batch_size", "2"], "a run of 6 steps ends before --learning_rate is"),
        (5, ["--num_train_epochs", "3", "--train_batch_size", "2"], ""),
        (5, ["--max_train_steps", "5", "--lr_scheduler", "constant"], "no effect on --lr_scheduler constant, but on"),
    ],
)
def test_a_warm_up_that_outlasts_the_run(warmup, length, told, tmp_path, capsys):
    words = ["--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", str(warmup), *length]
    flags = parse(tmp_path, *words)
    stages._check_length(flags, plan(flags.training, 1, images_per_epoch=4))
    warnings = [line for line in capsys.readouterr().err.splitlines() if "--lr_warmup_steps" in line]
    assert len(warnings) == bool(told) and all(told in line for line in warnings)
