"""icm_jax: learned image coding for machines as well as for humans."""
