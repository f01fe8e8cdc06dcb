"""Write a model's matrices in fewer bits, calibrated on a text: `dispec quantize`."""
