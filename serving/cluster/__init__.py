"""Several engines behind one address: workers with roles, migration of requests, autoscaling."""
