"""What is minimised: each objective is a list of phases, and the loop never asks which kind it runs."""
