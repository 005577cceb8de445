"""What the workers read: the broker, and one run at a time for each process. Must be on their PYTHONPATH.

Without CELERY_REDIS_URL they do not start: they would look for a RabbitMQ that is not there.
"""

import os

broker_url = result_backend = os.environ["CELERY_REDIS_URL"]
result_expires = 86400
task_track_started = True
# A worker takes a run when it has a process for it; else runs wait behind others here while another worker is idle.
worker_disable_prefetch = True
worker_prefetch_multiplier = 1
# A process that has served that many runs makes place for a fresh one.
worker_max_tasks_per_child = 500
# What a worker holds when it is asked to stop may end; the supervisor should wait as long (TimeoutStopSec, grace period).
worker_soft_shutdown_timeout = 60
broker_connection_retry_on_startup = True
