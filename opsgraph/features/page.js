"use strict";
// What is chosen is pressed; its facts are shown, its lines of source marked. The arrow keys move.
const buttons = [...document.querySelectorAll(".line button")];
const lines = [...document.querySelectorAll(".source pre span")];
const shown = () => buttons.filter((button) => button.offsetParent !== null);

function choose(chosen, scrolls) {
  for (const button of buttons) {
    const pressed = button === chosen;
    button.setAttribute("aria-pressed", pressed);
    button.tabIndex = pressed ? 0 : -1;
    document.getElementById(button.dataset.facts).hidden = !pressed;
  }
  const key = chosen.dataset.key;
  for (const line of lines) line.classList.toggle("marked", Boolean(key) && line.dataset.key === key);
  const first = lines.find((line) => line.classList.contains("marked"));
  if (first && scrolls) first.scrollIntoView({ block: "nearest" });
}

function move(button) {
  button.focus();
  choose(button, true); // also where the window is not focused, and no event comes
}

function beside(button, way) {
  // The nearest row above or below, and in it the step whose middle is nearest.
  const { top, left, width } = button.getBoundingClientRect();
  const distance = (other) => {
    const box = other.getBoundingClientRect();
    return Math.abs(box.top - top) * 1e4 + Math.abs(box.left + box.width / 2 - left - width / 2);
  };
  const there = shown().filter((other) => way * (other.getBoundingClientRect().top - top) > 1);
  return there.sort((a, b) => distance(a) - distance(b))[0];
}

document.querySelector(".line").addEventListener("keydown", (event) => {
  const all = shown(), at = all.indexOf(document.activeElement);
  if (at < 0) return;
  const targets = {
    ArrowLeft: () => all[at - 1], ArrowRight: () => all[at + 1], Home: () => all[0],
    End: () => all[all.length - 1], ArrowUp: () => beside(all[at], -1), ArrowDown: () => beside(all[at], 1),
  };
  if (!(event.key in targets)) return;
  event.preventDefault();
  const target = targets[event.key]();
  if (target) move(target);
});
for (const button of buttons) {
  button.addEventListener("focus", () => choose(button, true));
  button.addEventListener("click", () => move(button));
}
for (const line of lines) {
  const button = buttons.find((button) => button.dataset.key && button.dataset.key === line.dataset.key);
  if (!button) continue;
  line.classList.add("leads");
  line.addEventListener("click", () => move(button));
}
document.getElementById("refused").addEventListener("change", (event) => {
  document.body.classList.toggle("only-taken", !event.target.checked);
  const pressed = buttons.find((button) => button.getAttribute("aria-pressed") === "true");
  if (pressed && pressed.offsetParent === null) choose(shown()[0], false);
});
if (buttons.length) choose(buttons[0], false);
