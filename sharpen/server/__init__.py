"""The scorer over HTTP: requests in, micro-batches of one scorer, answers out.

    bytes -> `bodies` -> a route (`rewards`, `completions`) with its pydantic models -> jobs
          -> `batcher` (one thread, one scorer) -> the answer of the route -> `bodies` -> bytes

`app` takes a request along this way, and alone knows FastAPI, Starlette and uvicorn. `batcher`,
`text`, `text_rewards` and `unscorable` need nothing that `sharpen[serve]` brings: integrations use
them inside a trainer.
"""
