"""Stable Diffusion 1.x and 2.x: one text encoder, whose last hidden state the UNet reads."""

from collections.abc import Mapping

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from dreambooth.command_line.console import UserError
from dreambooth.model.family import Conditioning, View
from dreambooth.model.fit import check_latents, check_vae, check_vocabulary, check_width
from dreambooth.model.prompts import tokens_of


class StableDiffusion:
    """The family (`dreambooth.model.family.Family`).

    Its conditioning is encoder_hidden_states (prompts, tokens, width); of a text encoder that is trained, input_ids
    (prompts, tokens), int64.
    """

    name = "Stable Diffusion 1.x or 2.x"
    pipeline = StableDiffusionPipeline
    components = {"text_encoder": CLIPTextModel, "vae": AutoencoderKL, "unet": UNet2DConditionModel}
    labels = {"text_encoder": "text encoder", "vae": "VAE", "unet": "UNet"}
    text_encoders = ("text_encoder",)
    tokenizers = ("tokenizer",)
    others = ("safety_checker", "feature_extractor", "image_encoder")
    left_out = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    resolution = 512
    heeds_force_upcast = False

    def told_apart(self, classes: Mapping[str, str | None]) -> None:
        return None

    def check_fit(self, tokenizers: Mapping[str, CLIPTokenizer], components: Mapping[str, torch.nn.Module]) -> None:
        text_encoder, unet = components["text_encoder"], components["unet"]
        check_vocabulary(tokenizers["tokenizer"], text_encoder)
        check_vae(components["vae"])
        check_latents(unet, components["vae"])
        check_width(unet, text_encoder.config.hidden_size)
        if any(unet.config[name] for name in ("addition_embed_type", "class_embed_type", "num_class_embeds")):
            raise UserError(f"the UNet wants more than an image and a prompt: use that of a {self.name}")

    def freeze_unread(self, components: Mapping[str, torch.nn.Module]) -> None:
        pass

    def tokenize(
        self,
        prompts: list[str],
        tokenizers: Mapping[str, CLIPTokenizer],
        components: Mapping[str, torch.nn.Module],
    ) -> Conditioning:
        return {"input_ids": tokens_of(prompts, tokenizers["tokenizer"], components["text_encoder"])}

    def encode(self, tokens: Conditioning, text_encoders: Mapping[str, torch.nn.Module]) -> Conditioning:
        return {"encoder_hidden_states": text_encoders["text_encoder"](tokens["input_ids"])[0]}

    def of_view(self, view: View) -> Conditioning:
        return {}

    def predict(
        self, unet: torch.nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        return unet(noisy_latents, timesteps, conditioning["encoder_hidden_states"]).sample


STABLE_DIFFUSION = StableDiffusion()
