"""Several engines behind one address: workers with roles, request migration, autoscaling."""
