"""The scorer over HTTP: requests in, micro-batches of one scorer, answers out.

    bytes -> `bodies` -> a dialect (`score`, `completions`, `reward_hosts`) -> jobs
          -> `micro_batcher` (one thread, one scorer) -> the dialect again -> `bodies` -> bytes

`answering` takes a request along this way, `gate` stands before it. `app`, `answering` and
`running` alone know FastAPI, Starlette and uvicorn.
"""
