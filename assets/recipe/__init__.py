"""How assets/tiny-stable-diffusion and assets/instance_images were made."""
