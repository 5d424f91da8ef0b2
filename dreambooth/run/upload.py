"""The trained pipeline's copy on the Hub: --push_to_hub."""

import shlex
from pathlib import Path, PurePosixPath

from huggingface_hub import CommitOperationAdd, HfApi, ModelCardData

from dreambooth.command_line.console import RunError, UserError, is_rank_0
from dreambooth.command_line.flags import OutputFlags
from dreambooth.model.hub import hub_reason
from dreambooth.model.lora import WEIGHTS
from dreambooth.run.listing import pipeline_files, read_listing

CARD = "README.md"
# What a repository says of itself; {data} is what the Hub reads.
TEXT = """---
{data}
---

# {title}

{what} that DreamBooth ([arXiv 2208.12242](https://arxiv.org/abs/2208.12242)) has taught a subject{base}, in {step}
steps.
{prompt}
```python
from diffusers import AutoPipelineForText2Image

{load}
```
"""


def hub_name(flags: OutputFlags) -> str:
    """Returns the repository that --push_to_hub uploads to, as far as the flags name it."""
    return flags.hub_model_id or Path(flags.output_dir).resolve().name


def prepare_hub(flags: OutputFlags) -> str | None:
    """Creates the repository that --push_to_hub names, before any time is spent on training; on rank 0.

    Returns:
        The repository's full name; None where nothing is to be uploaded.

    Raises:
        UserError: if the Hub cannot be reached or refuses, or has a public repository where it is to be private.
    """
    if not flags.push_to_hub or not is_rank_0():
        return None
    name = hub_name(flags)
    try:
        api = HfApi(token=flags.hub_token)
        repo_id = api.create_repo(name, private=flags.hub_private_repo or None, exist_ok=True).repo_id
        is_public = flags.hub_private_repo and not api.repo_info(repo_id).private
    except Exception as error:  # Whatever the network and the Hub can answer: nothing has been done yet.
        raise UserError(f"--push_to_hub: cannot create {name} on the Hub: {hub_reason(error, writes=True)}") from error
    if is_public:
        raise UserError(f"--hub_private_repo: {repo_id} is there, and is public: make it private, or name another one")
    return repo_id


def model_card(output_dir: Path, repo_id: str, instance_prompt: str | None) -> str:
    """Returns the text that a repository shows, and by which the Hub sorts it."""
    told = read_listing(output_dir)
    base, is_lora = told.get("base_model"), WEIGHTS in pipeline_files(output_dir)
    data = ModelCardData(
        base_model=base,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusers", "dreambooth", *["lora"] * is_lora],
        instance_prompt=instance_prompt,
    )
    loads = (base or "the model that it was trained with") if is_lora else repo_id
    load = f'pipeline = AutoPipelineForText2Image.from_pretrained("{loads}")'
    if is_lora:
        load += f'\npipeline.load_lora_weights("{repo_id}")'
    return TEXT.format(
        data=data.to_yaml(),
        title=repo_id.rpartition("/")[2],
        what="Adapters (LoRA)" if is_lora else "A pipeline",
        step=told.get("step"),
        base=f" from {base}" if base else "",
        prompt=f"\nThe prompt of the subject: *{instance_prompt}*\n" if instance_prompt else "",
        load=load,
    )


def upload(flags: OutputFlags, repo_id: str, instance_prompt: str | None) -> None:
    """Uploads the trained pipeline's files, and nothing else of the output folder; and a card if there is none.

    Args:
        flags: of the run.
        repo_id: the repository's full name.
        instance_prompt: that the card tells, where there is one for all images.

    Raises:
        RunError: if the Hub cannot be reached or refuses.
    """
    output_dir = Path(flags.output_dir)
    files = pipeline_files(output_dir)
    api = HfApi(token=flags.hub_token)
    added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=output_dir / name) for name in files]
    try:
        if not api.file_exists(repo_id, CARD):
            card = model_card(output_dir, repo_id, instance_prompt).encode()
            added.append(CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=card))
        api.create_commit(repo_id=repo_id, operations=added, commit_message="DreamBooth training")
    except Exception as error:  # whatever the network and the Hub can answer
        parts = sorted({PurePosixPath(name).parts[0] for name in files})
        patterns = [part if (output_dir / part).is_file() else f"{part}/*" for part in parts]
        what = "LoRA" if WEIGHTS in files else "pipeline"
        call = f"upload_folder(repo_id={repo_id!r}, folder_path={str(output_dir)!r}, allow_patterns={patterns})"
        raise RunError(
            f"--push_to_hub: {hub_reason(error, writes=True)}; the {what} is whole in {output_dir}: "
            f"python -c {shlex.quote(f'from huggingface_hub import *; {call}')} uploads it"
        ) from error
