"""What is made of weights, and what goes into it. May import torch, diffusers, transformers and peft."""
