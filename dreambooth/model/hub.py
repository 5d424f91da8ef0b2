"""The Hub's answers, in words that say what to do."""

from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

from dreambooth.command_line.console import first_line

HUB_TIMEOUT_S = 30
# What the libraries that speak HTTP for it raise where nobody answers: requests, and httpx in newer releases.
UNANSWERED = {"ConnectionError", "Timeout", "TransportError"}


def can_be_hub_id(name: str) -> bool:
    """Whether a name that is no folder can be on the Hub: "name" or "owner/name"; all else is meant as a path."""
    return not name.startswith((".", "/", "~")) and name.count("/") < 2


def hub_reason(error: Exception, *, writes: bool = False) -> str:
    """Returns why something cannot be had from the Hub, or be written there, for which no cache serves."""
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and it is not whole in the cache"
    if isinstance(error, GatedRepoError):
        return "accept its terms on its page there, and use `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "there is none of that name; `hf auth login` is needed to see a private one"
    if UNANSWERED & {kind.__name__ for kind in type(error).__mro__}:
        return "no answer; see to the network" + (
            "" if writes else ", or set HF_HUB_OFFLINE=1 to use what is in the cache"
        )
    return first_line(error)
