// Numbers as people read them.

export function formatBytes(bytes) {
  if (bytes === undefined) return "–";
  const units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
  let value = bytes;
  let unit = 0;
  while (value >= 999.5 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${unit === 0 ? Math.round(value) : value.toPrecision(3)} ${units[unit]}`;
}

export function formatMilliseconds(duration) {
  return duration < 999.5 ? `${Math.round(duration)} ms` : `${(duration / 1000).toFixed(2)} s`;
}
