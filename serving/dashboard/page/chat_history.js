// The conversation. It stays in this tab's session storage: it survives a reload, and is gone when the tab is closed.
//
// A turn is { question, answer }. An answer is { content, reasoning, state, error, statistics }; its state is "running",
// "done", "stopped" or "failed". Turns before `firstSent` no longer fit the model's context.

const ITEM = "dispec-chat";

export const conversation = restored() ?? { turns: [], firstSent: 0 };

export function newAnswer() {
  return { content: "", reasoning: "", state: "running", error: null, statistics: "" };
}

function restored() {
  try {
    const found = JSON.parse(sessionStorage.getItem(ITEM));
    for (const { answer } of found.turns) {
      if (answer.state !== "running") continue;
      Object.assign(answer, { state: "failed", error: "The page was closed before the answer ended." });
    }
    return found;
  } catch {
    return null;
  }
}

// Returns whether there was room for the conversation.
export function save() {
  try {
    sessionStorage.setItem(ITEM, JSON.stringify(conversation));
    return true;
  } catch {
    sessionStorage.removeItem(ITEM); // an older state would come back at a reload as if it were the last
    return false;
  }
}

export function clear() {
  Object.assign(conversation, { turns: [], firstSent: 0 });
  sessionStorage.removeItem(ITEM);
}

// Returns the messages of a request for the last turn's answer. A question without an answer is left out.
export function messagesFrom(first, system) {
  const last = conversation.turns.at(-1);
  const earlier = conversation.turns.slice(first, -1).filter((turn) => turn.answer.content);
  return [...systemMessage(system), ...earlier.flatMap(messagesOf), { role: "user", content: last.question }];
}

const systemMessage = (system) => (system ? [{ role: "system", content: system }] : []);
const messagesOf = ({ question, answer }) => [
  { role: "user", content: question },
  ...(answer.content ? [{ role: "assistant", content: answer.content }] : []),
];

export function asJson(system) {
  return JSON.stringify({ messages: [...systemMessage(system), ...conversation.turns.flatMap(messagesOf)] }, null, 2);
}

export function asMarkdown(system) {
  const parts = system ? [`## System\n\n${system}`] : [];
  for (const { question, answer } of conversation.turns) parts.push(`## You\n\n${question}`, `## Model\n\n${answer.content}`);
  return `${parts.join("\n\n")}\n`;
}
