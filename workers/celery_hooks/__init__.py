"""All that touches Celery's or kombu's insides. Pinned to a minor version, contract-tested, each hook switchable
back to stock by a CORTEX_* setting (``pool``, ``backend``, ``transport``)."""
