import time
def test_x(caller, picture, server):
    for i in range(20):
        print(caller.ask("").error)
        a=caller.ask("hi", max_tokens=5); assert a.error is None
    from tritonclient import grpc
    import queue
    q=queue.Queue()
    c=grpc.InferenceServerClient(server.grpc_url)
    c.start_stream(lambda r,e: q.put((r,e)))
    c.async_stream_infer("nvlm", caller.inputs("What is it", max_tokens=450), request_id="zz")
    for _ in range(3): print(q.get(timeout=10)[1])
    t=time.perf_counter()
    c.stop_stream(cancel_requests=True)
    print("stopped", time.perf_counter()-t)
    time.sleep(4)
    print(server.log_file.read_text()[-1500:])
    for i in range(20):
        print(i, caller.status_of(""))
        a=caller.ask("hi", max_tokens=5, timeout_s=5); assert a.error is None
