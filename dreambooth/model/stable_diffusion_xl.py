"""Stable Diffusion XL: two text encoders, and a UNet that is told how an image was cropped (arXiv 2307.01952)."""

from collections.abc import Mapping

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dreambooth.command_line.console import UserError
from dreambooth.model.family import Conditioning, View, readers_of
from dreambooth.model.fit import check_latents, check_vae, check_vocabulary, check_width
from dreambooth.model.prompts import tokens_of

TIME_IDS = 6  # numbers that the UNet reads of a view
OF_REFINER = 5  # that of the refiner reads a score of the image in the place of its size
REFINER = "the refiner of Stable Diffusion XL, which cannot be trained here"


class StableDiffusionXL:
    """The family (`dreambooth.model.family.Family`).

    Its conditioning is encoder_hidden_states (prompts, tokens, width of both encoders) and text_embeds (prompts, width
    of the second's projection); time_ids (examples, 6), int64; of text encoders that are trained, input_ids and
    input_ids_2 (prompts, tokens), int64.
    """

    name = "Stable Diffusion XL"
    pipeline = StableDiffusionXLPipeline
    components = {
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
        "vae": AutoencoderKL,
        "unet": UNet2DConditionModel,
    }
    labels = {
        "text_encoder": "text encoder",
        "text_encoder_2": "second text encoder",
        "vae": "VAE",
        "unet": "UNet",
    }
    text_encoders = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")
    others = ("feature_extractor", "image_encoder")
    left_out = {"feature_extractor": None, "image_encoder": None, "add_watermarker": False}
    resolution = 1024
    heeds_force_upcast = True  # in fp16 the activations of its own VAE overflow

    def told_apart(self, classes: Mapping[str, str | None]) -> str | None:
        return REFINER if classes.get("text_encoder_2") and not classes.get("text_encoder") else None

    def check_fit(self, tokenizers: Mapping[str, CLIPTokenizer], components: Mapping[str, torch.nn.Module]) -> None:
        unet, vae = components["unet"].config, components["vae"].config
        for tokenizer, text_encoder in readers_of(self, {**tokenizers, **components}):
            check_vocabulary(tokenizer, text_encoder)
        check_vae(components["vae"])
        check_latents(components["unet"], components["vae"])
        if unet.addition_embed_type != "text_time" or any((unet.class_embed_type, unet.num_class_embeds)):
            raise UserError(f"the UNet does not read what that of a {self.name} does: use such a one")
        check_width(components["unet"], sum(components[name].config.hidden_size for name in self.text_encoders))
        added, pooled = unet.projection_class_embeddings_input_dim, components["text_encoder_2"].config.projection_dim
        wanted = pooled + TIME_IDS * unet.addition_time_embed_dim
        if added != wanted:
            is_refiner = added == pooled + OF_REFINER * unet.addition_time_embed_dim
            raise UserError(
                f"the UNet reads {added} numbers beside the prompt, and this model has {wanted}: "
                + (f"it is {REFINER}" if is_refiner else "use a UNet of it")
            )
        if getattr(vae, "latents_mean", None) is not None:
            raise UserError("the VAE's latents are to be shifted by latents_mean, which is not done here: use another")

    def freeze_unread(self, components: Mapping[str, torch.nn.Module]) -> None:
        # Of the first text encoder `encode` takes what goes into its last layer.
        text_encoder = components["text_encoder"]
        last = f"layers.{text_encoder.config.num_hidden_layers - 1}."
        for name, weight in text_encoder.named_parameters():
            if last in name or "final_layer_norm" in name:
                weight.requires_grad_(False)

    def tokenize(
        self,
        prompts: list[str],
        tokenizers: Mapping[str, CLIPTokenizer],
        components: Mapping[str, torch.nn.Module],
    ) -> Conditioning:
        return {
            "input_ids": tokens_of(prompts, tokenizers["tokenizer"], components["text_encoder"]),
            "input_ids_2": tokens_of(prompts, tokenizers["tokenizer_2"], components["text_encoder_2"]),
        }

    def encode(self, tokens: Conditioning, text_encoders: Mapping[str, torch.nn.Module]) -> Conditioning:
        first = text_encoders["text_encoder"](tokens["input_ids"], output_hidden_states=True)
        second = text_encoders["text_encoder_2"](tokens["input_ids_2"], output_hidden_states=True)
        # Of each the last layer but one, without the final normalization.
        hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return {"encoder_hidden_states": hidden, "text_embeds": second.text_embeds}

    def of_view(self, view: View) -> Conditioning:
        # Whole numbers, which nothing rounds: bf16 has not all of those above 256.
        return {"time_ids": torch.tensor([*view.original_size, *view.crop, *view.size])}

    def predict(
        self, unet: torch.nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        added = {name: conditioning[name] for name in ("text_embeds", "time_ids")}
        return unet(noisy_latents, timesteps, conditioning["encoder_hidden_states"], added_cond_kwargs=added).sample


STABLE_DIFFUSION_XL = StableDiffusionXL()
