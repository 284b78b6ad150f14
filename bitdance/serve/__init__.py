"""Pictures over HTTP, in the form of OpenAI's images API.

`settings.py` what a client may ask for · `errors.py` · `openai_images.py` fields → request · `model.py` request → pictures to
make, with the rules of the command · `tasks.py` a request that was taken in → `worker.py` a batch of pictures → `queue.py` the
bounded queue and its threads · `answers.py` · `gate.py` key and origin · `metrics.py`, `schema.py` · `api.py` the app →
`server.py` a process that serves it.
"""
