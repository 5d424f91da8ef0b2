"""What a run would take, told by a --dry_run."""

from dreambooth.command_line.console import say, warn
from dreambooth.command_line.flags import Flags
from dreambooth.command_line.limits import host_memory_gib
from dreambooth.command_line.paths import kind_on_disk
from dreambooth.processes.ranks import Ranks
from dreambooth.run.folders import readable
from dreambooth.run.room import Sizes, room_of, too_little
from dreambooth.run.tracker import Tracker
from dreambooth.run.upload import hub_name


def tell_plan(
    flags: Flags,
    tracker: Tracker,
    ranks: Ranks,
    *,
    first_step: int,
    sizes: Sizes,
) -> None:
    """Prints steps, time, memory and disk space, from what the steps of a dry run have shown.

    Args:
        flags: of the run.
        tracker: that has seen the steps; the last one is what others are taken to be like.
        ranks: of the run.
        first_step: steps that an earlier run has done.
        sizes: of what the run would write.
    """
    steps = max(0, tracker.schedule.steps - first_step)
    say(f"steps: {tracker.schedule}, {steps} of them to do")
    if steps > 0:
        seconds = tracker.seconds_per_step
        say(f"time: {duration(steps * seconds)} of training at {seconds:.3g} s a step, without saving and validation")
        if ranks.device.type == "cuda":
            before, after = f"{tracker.peak_memory_gib:.1f} GiB of GPU memory and ", ""
        else:
            mapped = host_memory_gib("RssFile")
            before, after = "", f", {mapped:.1f} GiB of it mapped files, which the estimate leaves out"
        say(f"memory: {before}{tracker.peak_host_memory_gib:.1f} GiB of host memory for each process{after}")
    output, model = flags.output, flags.model
    room = room_of(output, tracker.schedule, sizes, first_step=first_step)
    say(f"disk: {room}")
    if room.free < room.needed:
        warn(too_little(output.output_dir, room))
    if output.push_to_hub:
        say(f"upload: {readable(sizes.pipeline)} to {hub_name(output)}")
    sources = [model.pretrained_model_name_or_path, model.pretrained_vae_model_name_or_path, model.tokenizer_name]
    is_cached = any(name and kind_on_disk(name) != "folder" for name in [*sources, model.external_unet_path])
    where = " outside the caches of models and data sets"
    say(f"nothing was written{where * (is_cached or flags.instance.dataset_name is not None)}")


def duration(seconds: float) -> str:
    """Returns a time in words, rounded as an estimate is."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
