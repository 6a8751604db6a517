"""The batch size of a fit, by schedule or by the noise of its gradients."""
