"""What the two DreamBooth trainers share; nothing in here imports colossalai or accelerate."""
