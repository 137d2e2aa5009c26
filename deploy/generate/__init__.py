"""Files of deployments, made from queues.yaml: ``python -m deploy.generate``."""
