"""Serve a live `nn.Module`, train it, and serve the trained weights: one set of weights, no copy."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from penstock import LLM, SamplingParams

LESSON = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]


def main() -> None:
    torch.manual_seed(0)
    shape = LlamaConfig(vocab_size=10, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(shape).train()

    llm = LLM(model, skip_tokenizer_init=True)  # token ids in and out
    params = SamplingParams(temperature=0, max_tokens=len(LESSON) - 3, ignore_eos=True)
    print("before:", llm.generate(LESSON[:3], params, use_tqdm=False)[0].generated_ids)

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.tensor([LESSON])
    for step in range(40):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        with llm.updating():  # no request runs meanwhile, and none finds K/V of the old weights
            optimizer.step()
        if step % 13 == 0:
            print(f"step {step:2}: loss {loss.item():.3f}")

    print("after: ", llm.generate(LESSON[:3], params, use_tqdm=False)[0].generated_ids)
    print("target:", LESSON[3:])
    llm.stop()


if __name__ == "__main__":
    main()
