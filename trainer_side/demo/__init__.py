"""The demo: a tiny policy learns a checkable token task by GRPO, from rollouts that a weighed engine samples."""
