// The page of `scissor-vllm show`: the picture that lies in it.
const view = new PictureView(document.getElementById("picture"),
  JSON.parse(document.getElementById("data").textContent));
view.ready.then(() => document.body.setAttribute("data-drawn", "true"));
