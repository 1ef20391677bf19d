// The tab in TensorBoard: the page with the data of the server.
import { start } from "./page.js";
import { Server } from "./source.js";

export function render() {
  const style = document.createElement("link");
  style.rel = "stylesheet";
  style.href = "./page.css";
  style.addEventListener("load", () => start(new Server()));
  document.head.append(style);
}
