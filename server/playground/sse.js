// Server-sent events out of the bytes of a response, however they are cut.

/** The `data` of each event. Comments, other fields and an unfinished event at the end are left out. */
export async function* events(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  const take = (line) => {
    if (line === "") {
      const whole = data.length ? data.join("\n") : null;
      data = [];
      return whole;
    }
    const [, field, value] = /^([^:]*):? ?(.*)$/s.exec(line);
    if (field === "data") data.push(value);
    return null;
  };
  try {
    for (;;) {
      const { done, value } = await reader.read();
      rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
      // A carriage return at the end may be half of a line's end.
      const lines = (done ? rest : rest.replace(/\r$/, "")).split(/\r\n|\n|\r/);
      const held = !done && rest.endsWith("\r") ? "\r" : "";
      rest = lines.pop() + held;
      for (const line of lines) {
        const event = take(line);
        if (event !== null) yield event;
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
