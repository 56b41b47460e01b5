def calls(m):
    sizes = {"head_dim": 16, "rope_theta": 50.0}
    trained = {"factor": 4.0, m.LENGTH: 64}
    bands = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return [
        (lambda: m.linear(**sizes, factor=4.0),),
        (lambda: m.dynamic(**sizes, factor=4.0, max_position_embeddings=64, length=100),),
        (lambda: m.yarn(**sizes, **trained),),
        (lambda: m.llama3(**sizes, **trained, **bands),),
    ]
