"""Look at a queue's parked jobs, put one back, or forget one: python examples/dead_letters.py QUEUE [--retry ID]."""

from __future__ import annotations

import argparse
import json
from datetime import datetime
from typing import Any

import redis

from cortex_tasks import Settings
from cortex_tasks.codec import queue_key
from cortex_tasks.depths import dead_letter_key


def listed(client: Any, queue: str) -> None:
    for raw in client.lrange(dead_letter_key(queue), 0, -1):
        entry = json.loads(raw)
        when = datetime.fromtimestamp(entry["at"]).isoformat(" ", "seconds")
        message = entry["message"]
        # Anyone may write to a queue: a message that cannot be read is parked as the text it was.
        shown = message["headers"].get("kwargsrepr", "") if isinstance(message, dict) else message[:100]
        print(f"{entry['id']}  {when}  {entry['reason']}\n    {shown}")


def take_out(client: Any, queue: str, job_id: str, *, retry: bool) -> None:
    key = dead_letter_key(queue)
    found = [raw for raw in client.lrange(key, 0, -1) if json.loads(raw)["id"] == job_id]
    if not found:
        raise SystemExit(f"no job {job_id} on {key}")
    message = json.loads(found[0])["message"]
    if retry and not isinstance(message, dict):
        raise SystemExit(f"job {job_id} cannot be read: it can only be dropped")
    with client.pipeline() as pipe:
        # Without this it would be parked again at once.
        pipe.delete(f"cortex:attempts:{job_id}")
        if retry:
            pipe.lpush(queue_key(queue, message["properties"].get("priority") or 0), json.dumps(message))
        for raw in found:
            pipe.lrem(key, 1, raw)
        pipe.execute()
    print(f"{job_id} {'is back in its queue' if retry else 'is forgotten'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("queue")
    parser.add_argument("--retry", metavar="ID", help="put a job back into its queue")
    parser.add_argument("--drop", metavar="ID", help="forget a job")
    given = parser.parse_args()
    with redis.Redis.from_url(Settings.from_env().broker) as client:
        if given.retry or given.drop:
            take_out(client, given.queue, given.retry or given.drop, retry=bool(given.retry))
        else:
            listed(client, given.queue)


if __name__ == "__main__":
    main()
