"""What a training step costs, side by side with PEFT and the Trainer."""
