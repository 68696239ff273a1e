// Numbers for people.

export function count(number) {
  return Math.round(number).toLocaleString("en");
}

export function parameters(number) {
  const units = ["", "K", "M", "B", "T"];
  let step = 0;
  while (number >= 999.5 && step < units.length - 1) {
    number /= 1000;
    step += 1;
  }
  return `${step ? Number(number.toPrecision(3)) : number}${units[step]}`;
}

export function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let step = 0;
  while (number >= 1024 && step < units.length - 1) {
    number /= 1024;
    step += 1;
  }
  return `${step ? number.toFixed(1) : number} ${units[step]}`;
}

export function duration(seconds) {
  const minutes = Math.floor(seconds / 60);
  if (minutes < 1) return `${Math.floor(seconds)} s`;
  if (minutes < 60) return `${minutes} min ${Math.floor(seconds % 60)} s`;
  const hours = Math.floor(minutes / 60);
  if (hours < 24) return `${hours} h ${minutes % 60} min`;
  return `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

export function pace(number) {
  if (number === 0) return "0";
  return number < 100 ? number.toFixed(1) : count(number);
}

// An element with text in it. All text of this page goes through here or `textContent`.
export function made(tag, className = "", text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text) element.textContent = text;
  return element;
}
