// Where an answer first says another word than the reference does.

/**
 * The first difference of two answers `{text, done}`, or null as long as there is none.
 *
 * A word counts when it can grow no more. Of the result, `start` and `end` say where the word stands in the answer (both
 * are the text's length where the answer ends and the reference goes on), `number` counts words from 1, `word` and
 * `instead` are the two words, "" where a text has ended.
 */
export function firstDifference(answer, reference) {
  const words = wholeWords(answer);
  const others = wholeWords(reference);
  for (let index = 0; ; index += 1) {
    const word = words[index];
    const other = others[index];
    const known = (word || answer.done) && (other || reference.done) && (word || other);
    if (!known) return null;
    if (word?.text === other?.text) continue;
    const start = word ? word.start : answer.text.length;
    const text = word?.text ?? "";
    return { start, end: start + text.length, number: index + 1, word: text, instead: other?.text ?? "" };
  }
}

function wholeWords({ text, done }) {
  const words = [];
  for (const match of text.matchAll(/\S+/g)) {
    const end = match.index + match[0].length;
    if (done || end < text.length) words.push({ text: match[0], start: match.index });
  }
  return words;
}
