"""The loss against values computed by hand."""

import math

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler

from dreambooth.model.loss import dreambooth_loss, encode_images, min_snr_weights, target_of, training_loss

# Two timesteps whose betas are 0.5: abar_0 = 0.5, abar_1 = 0.25.
BETAS = [0.5, 0.5]


class ConstantDenoiser(torch.nn.Module):
    """Predicts its input times one weight; keeps what it was called with."""

    def __init__(self, weight: float):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight))

    def forward(self, noisy_latents, timesteps, text):
        self.called_with = noisy_latents, timesteps, text
        return noisy_latents * self.weight


class IdentityVAE:
    """A posterior of mean x and deviation 2, one channel, scaling factor 0.5."""

    dtype = torch.float32
    config = type("Config", (), {"scaling_factor": 0.5})

    def encode(self, pixel_values):
        distribution = type("Distribution", (), {"mean": pixel_values, "std": torch.full_like(pixel_values, 2.0)})
        return type("Output", (), {"latent_dist": distribution})


def known_case(prediction_type: str, prior_loss_weight: float | None, snr_gamma: float | None = None):
    """An instance example at t=0 and a class example at t=1, of one pixel each."""
    batch = {
        "pixel_values": torch.tensor([3.0, 1.0]).view(2, 1, 1, 1),
        "posterior_noise": torch.tensor([0.5, -1.0]).view(2, 1, 1, 1),
        "noise": torch.tensor([2.0, -2.0]).view(2, 1, 1, 1),
        "timesteps": torch.tensor([0, 1]),
        "conditioning": {"encoder_hidden_states": torch.tensor([[[7.0]], [[8.0]]])},
        "rows": torch.tensor([0, 1]),
        "weights": torch.tensor([[1.0, 1.0]] if prior_loss_weight is None else [[1.0], [prior_loss_weight]]),
    }
    scheduler = DDPMScheduler(num_train_timesteps=2, trained_betas=BETAS, prediction_type=prediction_type)
    denoiser = ConstantDenoiser(0.1)
    loss = training_loss(
        denoiser,
        batch,
        vae=IdentityVAE(),
        noise_scheduler=scheduler,
        dtype=torch.float32,
        snr_gamma=snr_gamma,
    )
    assert denoiser.called_with[2]["encoder_hidden_states"].flatten().tolist() == [7.0, 8.0], (
        "each example has its prompt"
    )
    return loss


# By hand: latents z = 0.5 * (3 + 2 * 0.5) = 2 and 0.5 * (1 - 2) = -0.5.
NOISY = (math.sqrt(0.5) * 2 + math.sqrt(0.5) * 2, math.sqrt(0.25) * -0.5 + math.sqrt(0.75) * -2)
TARGETS = {
    "epsilon": (2.0, -2.0),
    "v_prediction": (
        math.sqrt(0.5) * 2 - math.sqrt(0.5) * 2,
        math.sqrt(0.25) * -2 - math.sqrt(0.75) * -0.5,
    ),
}


@pytest.mark.parametrize("prediction_type", TARGETS)
@pytest.mark.parametrize("weight", [None, 1.0, 0.25, 0.0])
def test_known_case(prediction_type, weight):
    squares = [(0.1 * noisy - target) ** 2 for noisy, target in zip(NOISY, TARGETS[prediction_type], strict=True)]
    by_hand = sum(squares) / 2 if weight is None else squares[0] + weight * squares[1]
    assert known_case(prediction_type, weight).item() == pytest.approx(by_hand, rel=1e-6)


# By hand: snr = 0.5 / 0.5 = 1 at t=0 and 0.25 / 0.75 = 1/3 at t=1.
MIN_SNR_WEIGHTS = {
    ("epsilon", 5.0): (1, 1),
    ("epsilon", 0.5): (0.5, 1),
    ("v_prediction", 5.0): (1 / 2, (1 / 3) / (4 / 3)),
    ("v_prediction", 0.5): (0.5 / 2, (1 / 3) / (4 / 3)),
}


@pytest.mark.parametrize(("prediction_type", "gamma"), MIN_SNR_WEIGHTS)
@pytest.mark.parametrize("weight", [None, 0.25])
def test_known_case_with_min_snr_weights(prediction_type, gamma, weight):
    """Each example of either term has the weight of its own timestep."""
    terms = [
        snr_weight * (0.1 * noisy - target) ** 2
        for snr_weight, noisy, target in zip(
            MIN_SNR_WEIGHTS[prediction_type, gamma], NOISY, TARGETS[prediction_type], strict=True
        )
    ]
    by_hand = sum(terms) / 2 if weight is None else terms[0] + weight * terms[1]
    assert known_case(prediction_type, weight, gamma).item() == pytest.approx(by_hand, rel=1e-6)


def test_min_snr_weights_without_any_signal():
    """At zero terminal SNR: the limit 1 for epsilon, and no weight for v."""
    scheduler = DDPMScheduler(num_train_timesteps=2, trained_betas=[0.5, 1.0])
    assert min_snr_weights(scheduler, torch.tensor([1]), 5.0).tolist() == [1]
    scheduler = DDPMScheduler(num_train_timesteps=2, trained_betas=[0.5, 1.0], prediction_type="v_prediction")
    assert min_snr_weights(scheduler, torch.tensor([1]), 5.0).tolist() == [0]


def test_mean_squared_error_is_taken_in_fp32():
    """In fp16 the square of 300 overflows."""
    loss = dreambooth_loss(torch.full((2, 1), 300.0).half(), torch.zeros(2, 1).half(), torch.ones(1, 2))
    assert loss.dtype == torch.float32 and loss.item() == 90000


def test_latents_carry_the_scaling_factor_of_the_vae():
    torch.manual_seed(0)
    shape = dict(block_out_channels=(8,), norm_num_groups=4, sample_size=8)
    vae = AutoencoderKL(**shape, scaling_factor=0.25).eval()
    pixels, noise = torch.rand(2, 3, 8, 8) * 2 - 1, torch.randn(2, 4, 8, 8)
    posterior = vae.encode(pixels).latent_dist
    by_hand = 0.25 * (posterior.mean + posterior.std * noise)
    torch.testing.assert_close(encode_images(vae, pixels, noise), by_hand.detach())


def test_a_large_batch_is_encoded_a_few_images_at_a_time(monkeypatch):
    """So that it takes no more memory than the passes, which come later."""
    vae, sizes = IdentityVAE(), []
    encode = vae.encode
    monkeypatch.setattr(vae, "encode", lambda few: sizes.append(len(few)) or encode(few), raising=False)
    pixels = torch.arange(5.0).view(5, 1, 1, 1).expand(-1, 1, 512, 512)
    latents = encode_images(vae, pixels, torch.ones_like(pixels))
    assert sizes == [2, 2, 1] and torch.equal(latents, 0.5 * (pixels + 2))


def test_other_targets_are_no_silent_epsilon():
    scheduler = DDPMScheduler(num_train_timesteps=2, trained_betas=BETAS, prediction_type="sample")
    with pytest.raises(AssertionError):
        target_of(scheduler, torch.zeros(1), torch.zeros(1), torch.zeros(1, dtype=torch.long))
