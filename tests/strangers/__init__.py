"""What strangers add to icm_jax; see test_extending.py."""
