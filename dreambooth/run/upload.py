"""The trained pipeline's copy on the Hub: --push_to_hub."""

from pathlib import Path, PurePosixPath

from huggingface_hub import CommitOperationAdd, HfApi

from dreambooth.command_line.console import RunError, UserError, is_rank_0
from dreambooth.command_line.flags import OutputFlags
from dreambooth.model.hub import hub_reason
from dreambooth.model.lora import WEIGHTS
from dreambooth.run.listing import pipeline_files


def hub_name(flags: OutputFlags) -> str:
    """Returns the repository that --push_to_hub uploads to, as far as the flags name it."""
    return flags.hub_model_id or Path(flags.output_dir).resolve().name


def prepare_hub(flags: OutputFlags) -> str | None:
    """Creates the repository that --push_to_hub names, before any time is spent on training; on rank 0.

    Returns:
        The repository's full name; None where nothing is to be uploaded.

    Raises:
        UserError: if the Hub cannot be reached or refuses.
    """
    if not flags.push_to_hub or not is_rank_0():
        return None
    name = hub_name(flags)
    try:
        return HfApi(token=flags.hub_token).create_repo(name, exist_ok=True).repo_id
    except Exception as error:  # Whatever the network and the Hub can answer: nothing has been done yet.
        raise UserError(f"--push_to_hub: cannot create {name} on the Hub: {hub_reason(error, writes=True)}") from error


def upload(flags: OutputFlags, repo_id: str) -> None:
    """Uploads the trained pipeline's files, and nothing else of the output folder.

    Raises:
        RunError: if the Hub cannot be reached or refuses.
    """
    output_dir = Path(flags.output_dir)
    files = pipeline_files(output_dir)
    try:
        HfApi(token=flags.hub_token).create_commit(
            repo_id=repo_id,
            operations=[CommitOperationAdd(path_in_repo=name, path_or_fileobj=output_dir / name) for name in files],
            commit_message="DreamBooth training",
        )
    except Exception as error:  # whatever the network and the Hub can answer
        parts = sorted({PurePosixPath(name).parts[0] for name in files})
        include = " ".join(part if (output_dir / part).is_file() else f"'{part}/*'" for part in parts)
        what = "LoRA" if WEIGHTS in files else "pipeline"
        raise RunError(
            f"--push_to_hub: {hub_reason(error, writes=True)}; the {what} is whole in {output_dir}: "
            f"hf upload {repo_id} {output_dir} . --include {include} uploads it"
        ) from error
